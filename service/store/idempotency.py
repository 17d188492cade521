"""Idempotency keys: a submission repeated under the same key makes no second job."""

from __future__ import annotations

import hashlib
import json
from datetime import timedelta

from sqlalchemy import delete
from sqlalchemy.orm import Session

from cliprd_core.spec import JobSpec
from service.store.errors import IdempotencyConflictError
from service.store.jobs import get_job
from service.store.models import IdempotencyKey, Job
from service.store.session import database_now

KEPT_HOURS = 48.0


def find_submitted(*, session: Session, key: str, spec: JobSpec) -> Job | None:
    """The job that was submitted under this key, or None if none was.

    Args:
        session: for reading.
        key: as the client made it up.
        spec: as the client sent it, not resolved.

    Raises:
        IdempotencyConflictError: the key was used for another spec.
    """
    row = session.get(IdempotencyKey, key)
    if row is None:
        return None
    if row.body_sha256 != _digest(spec):
        raise IdempotencyConflictError(key, row.job_id)
    return get_job(session=session, job_id=row.job_id)


def remember_key(*, session: Session, key: str, spec: JobSpec, job: Job) -> None:
    """Keep the key together with the new job, in the transaction that makes it.

    Raises:
        sqlalchemy.exc.IntegrityError: someone else's job has the key meanwhile, so this transaction must not be committed.
    """
    session.add(IdempotencyKey(key=key, body_sha256=_digest(spec), job_id=job.id, created_at=job.created_at))
    session.flush()


def forget_keys(*, session: Session, older_than_hours: float = KEPT_HOURS) -> None:
    """Drop keys that no client will repeat any more."""
    session.execute(delete(IdempotencyKey).where(IdempotencyKey.created_at < database_now(session) - timedelta(hours=older_than_hours)))


def _digest(spec: JobSpec) -> str:
    """Of the spec's meaning, so that the order of keys and spelled-out defaults don't matter."""
    return hashlib.sha256(json.dumps(spec.model_dump(mode="json"), sort_keys=True).encode()).hexdigest()
