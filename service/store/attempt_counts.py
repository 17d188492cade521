"""How attempts have ended, counted for good: what becomes of their jobs later, deletion included, takes nothing back."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from sqlalchemy import select
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.orm import Session

from cliprd_core.run_dir import ErrorReason
from service.store.models import EndedAttempts

SUCCEEDED = "succeeded"
CANCELLED = "cancelled"
GIVEN_BACK = "given_back"
"""In good order, by a worker that shuts down, or for a pause."""
LEASE_LOST = "lease_lost"
"""Nobody reported its end: the lease ran out. (`worker_lost` is a training process that was killed, and whose worker reported it.)"""
OUTCOMES = (SUCCEEDED, CANCELLED, GIVEN_BACK, LEASE_LOST, *(reason.value for reason in ErrorReason))
"""All ways in which an attempt can end."""


def count_ended(*, session: Session, ended: Iterable[tuple[str, str]]) -> None:
    """Count ended attempts, each by its queue and outcome.

    To be called last in the transaction that ends them: all that end attempts in the same way wait for it from here on. Rows are written in
    order, so that no two transactions wait for each other.
    """
    rows = [{"queue": queue, "outcome": outcome, "num_attempts": count} for (queue, outcome), count in sorted(Counter(ended).items())]
    if not rows:
        return
    dialect = postgresql if session.get_bind().dialect.name == "postgresql" else sqlite
    insert = dialect.insert(EndedAttempts)
    total = EndedAttempts.num_attempts + insert.excluded.num_attempts
    session.flush()
    session.connection().execute(insert.on_conflict_do_update(index_elements=["queue", "outcome"], set_={"num_attempts": total}), rows)


def ended_attempts(*, session: Session) -> dict[tuple[str, str], int]:
    """Attempts that have ended, by queue and outcome; without those that are none."""
    rows = session.execute(select(EndedAttempts.queue, EndedAttempts.outcome, EndedAttempts.num_attempts))
    return {(queue, outcome): count for queue, outcome, count in rows}
