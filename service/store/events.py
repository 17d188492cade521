"""What happened to jobs, in order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NamedTuple

from sqlalchemy import func, insert, select, text
from sqlalchemy.orm import Session, object_session

from service.store.bulk import insert_rows
from service.store.kinds import EventKind
from service.store.models import Job, JobEvent
from service.store.webhooks import WebhookEvent, add_messages

__all__ = [
    "EventKind",
    "JobEvent",
    "NewEvent",
    "is_recorded",
    "list_events",
    "newest_checkpoint",
    "newest_id",
    "record_event",
    "record_events",
    "session_of",
]


NOT_SENT = frozenset({EventKind.STARTED, EventKind.CHECKPOINT, EventKind.EVALUATED})
"""What webhooks are not told: it changes nothing about where the job is in its life."""

_NEXT_IDS = text("SELECT nextval(pg_get_serial_sequence('job_events', 'id')) FROM generate_series(1, :count)")


class NewEvent(NamedTuple):
    """An event that is to be written; the job's row is new or locked, so that of one job the ids are in order of commit."""

    job: Job
    kind: EventKind
    data: Mapping[str, Any] = {}


def record_event(job: Job, kind: EventKind, *, now: datetime, **data: Any) -> None:
    """Write an event of a job in the session that holds it."""
    record_events(session_of(job), [NewEvent(job, kind, data)], now=now)


def session_of(job: Job) -> Session:
    """The session that holds a job's row."""
    session = object_session(job)
    assert session is not None, "a job outside its session"
    return session


def record_events(session: Session, events: Sequence[NewEvent], *, now: datetime) -> None:
    """Write events of jobs that the session holds, in this order, and tell of them."""
    if not events:
        return
    rows = [{"job_id": job.id, "kind": kind, "attempt": job.attempt, "data": data, "created_at": now} for job, kind, data in events]
    ids = _insert(session, rows)
    sent = [WebhookEvent(*event, event_id) for event, event_id in zip(events, ids, strict=True) if event.kind not in NOT_SENT]
    add_messages(session, sent, now=now)


def _insert(session: Session, rows: Sequence[Mapping[str, Any]]) -> Sequence[int]:
    """Their ids. Of many rows PostgreSQL gives them beforehand, which takes half the time of having them returned in the rows' order."""
    if len(rows) == 1 or session.get_bind().dialect.name != "postgresql":
        return session.scalars(insert(JobEvent).returning(JobEvent.id, sort_by_parameter_order=True), rows).all()
    ids = session.scalars(_NEXT_IDS, {"count": len(rows)}).all()
    insert_rows(session, JobEvent, [{"id": one, **row} for one, row in zip(ids, rows, strict=True)])
    return ids


def is_recorded(job: Job, kind: EventKind, **data: Any) -> bool:
    """Whether the newest event of this kind in the job's attempt is this one."""
    query = select(JobEvent.data).where(JobEvent.job_id == job.id, JobEvent.attempt == job.attempt, JobEvent.kind == kind)
    return session_of(job).scalars(query.order_by(JobEvent.id.desc()).limit(1)).first() == data


def newest_checkpoint(job: Job) -> int:
    """The highest step of which any attempt stored a checkpoint; -1 if none did."""
    query = select(func.max(JobEvent.data["step"].as_integer())).where(JobEvent.job_id == job.id, JobEvent.kind == EventKind.CHECKPOINT)
    newest = session_of(job).scalar(query)
    return -1 if newest is None else newest


def list_events(*, session: Session, job_id: str, after: int = 0, limit: int = 100) -> Sequence[JobEvent]:
    """A job's events with ids above `after`, oldest first."""
    query = select(JobEvent).where(JobEvent.job_id == job_id, JobEvent.id > after).order_by(JobEvent.id).limit(limit)
    return session.scalars(query).all()


def newest_id(*, session: Session, job_id: str) -> int:
    """The id of a job's newest event."""
    return session.scalar(select(func.max(JobEvent.id)).where(JobEvent.job_id == job_id)) or 0
