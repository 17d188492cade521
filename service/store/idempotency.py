"""Idempotency keys: a submission repeated under the same key makes no second job."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from datetime import timedelta
from typing import NamedTuple

from sqlalchemy import delete, select
from sqlalchemy.orm import Session

from cliprd_core.spec import JobSpec
from service.store.bulk import insert_rows
from service.store.errors import IdempotencyConflictError
from service.store.models import IdempotencyKey, Job
from service.store.session import database_now

KEPT_HOURS = 48.0


class Keyed(NamedTuple):
    """A submission under a key."""

    key: str
    """As the client made it up."""
    digest: str
    """`digest` of the spec as the client sent it, not resolved."""


def find_submitted(*, session: Session, submissions: Sequence[Keyed]) -> dict[Keyed, Job | IdempotencyConflictError]:
    """Of each, the job that was submitted under its key before, or why the key can't be used: that was for another spec, or the job was
    deleted. New keys are left out."""
    if not submissions:
        return {}
    keys = {one.key for one in submissions}
    query = select(IdempotencyKey, Job).outerjoin(Job, Job.id == IdempotencyKey.job_id).where(IdempotencyKey.key.in_(keys))
    by_key: dict[str, tuple[IdempotencyKey, Job | None]] = {row.key: (row, job) for row, job in session.execute(query)}
    found: dict[Keyed, Job | IdempotencyConflictError] = {}
    for one in submissions:
        if one.key in by_key:
            earlier, job = by_key[one.key]
            if job is not None and earlier.body_sha256 == one.digest:
                found[one] = job
            else:
                found[one] = IdempotencyConflictError(one.key, earlier.job_id, is_deleted=job is None)
    return found


def remember_keys(*, session: Session, submissions: Sequence[tuple[Keyed, Job]]) -> None:
    """Keep the keys together with the new jobs, in the transaction that makes them.

    Raises:
        sqlalchemy.exc.IntegrityError: someone else's job has one of them meanwhile, so this transaction must not be committed.
    """
    # In the order of the keys, as whoever has one makes others wait for it.
    rows = [
        {"key": one.key, "body_sha256": one.digest, "job_id": job.id, "created_at": job.created_at}
        for one, job in sorted(submissions, key=lambda pair: pair[0].key)
    ]
    insert_rows(session, IdempotencyKey, rows)


def forget_keys(*, session: Session, older_than_hours: float = KEPT_HOURS) -> None:
    """Drop keys that no client will repeat any more."""
    session.execute(delete(IdempotencyKey).where(IdempotencyKey.created_at < database_now(session) - timedelta(hours=older_than_hours)))


def digest(spec: JobSpec) -> str:
    """Of the spec's meaning, so that the order of keys and spelled-out defaults don't matter."""
    return hashlib.sha256(json.dumps(spec.model_dump(mode="json"), sort_keys=True).encode()).hexdigest()
