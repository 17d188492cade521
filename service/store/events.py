"""What happened to jobs, in order."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session, object_session

from service.store.models import EventKind, Job, JobEvent
from service.store.webhooks import add_message

__all__ = ["EventKind", "JobEvent", "list_events", "record_event"]


NOT_SENT = frozenset({EventKind.STARTED, EventKind.CHECKPOINT, EventKind.EVALUATED})
"""What webhooks are not told: it changes nothing about where the job is in its life."""


def record_event(job: Job, kind: EventKind, *, now: datetime, **data: Any) -> None:
    """Write an event of a job in the session that holds it. Its row is new or locked, so that of one job the ids are in order of commit."""
    session = object_session(job)
    assert session is not None, "a job outside its session"
    event = JobEvent(job_id=job.id, kind=kind, attempt=job.attempt, data=data, created_at=now)
    session.add(event)
    session.flush()
    if kind not in NOT_SENT:
        add_message(session, job, event)


def list_events(*, session: Session, job_id: str, after: int = 0, limit: int = 100) -> Sequence[JobEvent]:
    """A job's events with ids above `after`, oldest first."""
    query = select(JobEvent).where(JobEvent.job_id == job_id, JobEvent.id > after).order_by(JobEvent.id).limit(limit)
    return session.scalars(query).all()
