"""A client that is frozen in the middle of a transaction loses it, so that its job can be taken over."""

from __future__ import annotations

from datetime import timedelta

import pytest
from sqlalchemy import text
from sqlalchemy.exc import OperationalError

from service.store import jobs
from service.store.leases import lock_held_job
from service.store.session import IDLE_TRANSACTION_SECONDS, database_now, make_engine, make_sessions, migrate
from tests.live import eventually
from tests.store_helpers import claim, create


def test_a_frozen_transaction_loses_its_lock_and_its_client_learns_that_the_store_was_out_of_reach(
    postgres_url: str,
) -> None:
    migrate(postgres_url)
    engine = make_engine(postgres_url)
    sessions = make_sessions(engine)
    job = create(sessions)
    claimed = claim(sessions, job.id)

    def requeue() -> list[jobs.QueuedJob] | None:
        with sessions.begin() as session:
            return jobs.requeue_expired(session=session, now=database_now(session) + timedelta(seconds=61)).queued or None

    frozen = sessions()
    lock_held_job(session=frozen, job_id=job.id, lease_token=claimed.lease_token)
    assert frozen.scalar(text("SHOW idle_in_transaction_session_timeout")) == f"{IDLE_TRANSACTION_SECONDS:g}s"
    assert requeue() is None, "its row is locked"
    frozen.execute(text("SET idle_in_transaction_session_timeout = 500"))  # so that it's soon over, for this one alone
    assert [queued.job_id for queued in eventually(requeue)] == [job.id]
    with pytest.raises(OperationalError):
        jobs.record_checkpoint(session=frozen, job_id=job.id, lease_token=claimed.lease_token, step=1)
    frozen.close()
    assert claim(sessions, job.id).attempt == 2
    engine.dispose()
