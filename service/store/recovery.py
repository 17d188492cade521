"""What the reaper calls from time to time: jobs whose worker vanished, and jobs whose message may be lost."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from datetime import datetime, timedelta
from typing import NamedTuple

from sqlalchemy import ColumnElement, func, or_, select, update
from sqlalchemy.orm import Session

from cliprd_core.run_dir import ErrorReason, ErrorRecord
from service.store.attempt_counts import LEASE_LOST, count_ended
from service.store.due import is_due
from service.store.errors import LeaseLostError
from service.store.leases import lock_held_job
from service.store.logs import add_line
from service.store.models import LOCK_ORDER, Job
from service.store.session import database_now
from service.store.states import JobState
from service.store.transitions import QueuedJob, end_badly, num_lost_attempts

LONGEST_LEASE_SECONDS = 600.0
"""No worker asks for a longer lease, so one that ends further ahead is of a clock that has been set back since."""

MAX_QUEUES = 1000
"""Whose messages are counted at one time: each is a question to the broker, and their names are the submitters'."""


MAX_JOBS_SENT = 1000
"""At one time, as leases that ran out wait meanwhile."""


class Expired(NamedTuple):
    """What became of leases that ran out."""

    lost: list[Job]
    """The jobs that were taken away, each with the attempt that was lost and the state that it has now."""
    queued: list[QueuedJob]
    """Those that are queued again; send their messages after the commit."""


def requeue_expired(*, session: Session, now: datetime | None = None) -> Expired:
    """Take every job away whose lease ran out before `now` (default: the database's clock).

    Such a job becomes `queued` again; or `cancelled`, if that was requested; or `failed` (`worker_lost`) at its `max_attempts`-th
    lost attempt. Several reapers may run at once: each job is handled by one.

    A lease that ends further ahead than any lease can is shortened to the longest one: whoever holds it renews it before that, and if
    nobody does, the job doesn't wait until the clock that was set back comes round to its end.
    """
    now = now or database_now(session)
    furthest = now + timedelta(seconds=LONGEST_LEASE_SECONDS)
    is_out = or_(Job.lease_expires_at < now, Job.lease_expires_at > furthest)
    query = select(Job).where(Job.state == JobState.RUNNING, is_out).order_by(*LOCK_ORDER).with_for_update(skip_locked=True)
    queued: list[QueuedJob] = []
    lost: list[Job] = []
    for job in session.scalars(query.execution_options(populate_existing=True)).all():
        assert job.lease_expires_at is not None, "a running job has a lease"
        if job.lease_expires_at > furthest:
            job.lease_expires_at = furthest
            continue
        message = (
            f"The worker ({job.worker}) stopped reporting, and its lease ran out: lost attempt {num_lost_attempts(job)} of at most"
            f" {job.max_attempts}. Look at the worker's log for why it ended; memory that ran out is the usual cause."
        )
        queued += _lose(session, job, message, now=now, is_lease_lost=True)
        lost.append(job)
    count_ended(session=session, ended=[(job.queue, LEASE_LOST) for job in lost])
    return Expired(lost, queued)


def end_leases_of_others(*, session: Session, worker: str) -> int:
    """For whoever knows that a worker whose name begins with `worker` is the only one there is: end the leases of all others, which are
    gone, so that the next round of a reaper takes their jobs back; how many there were."""
    running = (Job.state == JobState.RUNNING, ~Job.worker.startswith(worker, autoescape=True))
    statement = update(Job).where(*running).values(lease_expires_at=database_now(session) - timedelta(seconds=1)).returning(Job.id)
    return len(session.scalars(statement.execution_options(synchronize_session=False)).all())


def requeue_lost(*, session: Session, lease_token: str, cause: str) -> Expired:
    """Take a job away whose holder is known to be gone, with all processes of its run, without waiting for the lease to run out. What
    becomes of it is as of `requeue_expired`; nothing where the lease is not held any more.

    Args:
        session: The database's.
        lease_token: The holder's.
        cause: How it is known, as a sentence.
    """
    job_id = session.scalar(select(Job.id).where(Job.state == JobState.RUNNING, Job.lease_token == lease_token))
    try:
        job = None if job_id is None else lock_held_job(session=session, job_id=job_id, lease_token=lease_token)
    except LeaseLostError:
        job = None
    if job is None:
        return Expired([], [])
    message = f"{cause} Lost attempt {num_lost_attempts(job)} of at most {job.max_attempts}."
    queued = _lose(session, job, message, now=database_now(session), is_lease_lost=False)
    count_ended(session=session, ended=[(job.queue, ErrorReason.WORKER_LOST.value)])
    return Expired([job], queued)


def _lose(session: Session, job: Job, message: str, *, now: datetime, is_lease_lost: bool) -> list[QueuedJob]:
    """End a locked job's attempt as `worker_lost`, which its log tells, too: whoever held it says nothing more there."""
    add_line(session=session, job_id=job.id, line=f"Attempt {job.attempt} was lost: {message}")
    error = ErrorRecord(reason=ErrorReason.WORKER_LOST, message=message)
    return end_badly(session=session, job=job, error=error, now=now, is_lease_lost=is_lease_lost)


def num_to_send(*, session: Session, older_than_seconds: float, now: datetime | None = None) -> dict[str, int]:
    """By queue, how many queued jobs have waited this long since they were queued or last sent: their messages may be lost. Of very many
    queues some, others each time."""
    now = now or database_now(session)
    query = select(Job.queue, func.count()).where(*_may_be_lost(older_than_seconds, now)).group_by(Job.queue)
    return {row[0]: row[1] for row in session.execute(query.order_by(func.random()).limit(MAX_QUEUES))}


def jobs_to_send(
    *, session: Session, queues: Collection[str], older_than_seconds: float, now: datetime | None = None, limit: int | None = None
) -> list[QueuedJob]:
    """The jobs that `num_to_send` counts in these queues: the oldest of each first, then the second of each, so that no queue waits for a
    longer one; at most `limit` (default: MAX_JOBS_SENT) of all.

    A message too many is harmless, since only one claim succeeds.
    """
    now, limit = now or database_now(session), limit or MAX_JOBS_SENT
    place = func.row_number().over(partition_by=Job.queue, order_by=(Job.created_at, Job.id)).label("place")
    waiting = (
        select(Job.id, Job.queue, Job.created_at, place).where(Job.queue.in_(queues), *_may_be_lost(older_than_seconds, now)).subquery()
    )
    query = select(waiting.c.id, waiting.c.queue).where(waiting.c.place <= limit)
    query = query.order_by(waiting.c.place, waiting.c.created_at, waiting.c.id).limit(limit)
    return [QueuedJob(job_id, queue) for job_id, queue in session.execute(query)]


def _may_be_lost(older_than_seconds: float, now: datetime) -> tuple[ColumnElement[bool], ...]:
    cutoff = now - timedelta(seconds=older_than_seconds)
    is_old = or_(Job.sent_at.is_(None), Job.sent_at <= cutoff, Job.sent_at > now)  # ahead: of a clock that has been set back since
    return Job.state == JobState.QUEUED, is_due(cutoff, now), is_old


def mark_sent(*, session: Session, job_ids: Sequence[str]) -> None:
    """Record that these jobs' messages went to the broker just now. Jobs that were claimed meanwhile are left alone."""
    session.execute(select(Job.id).where(Job.id.in_(job_ids)).order_by(*LOCK_ORDER).with_for_update())
    statement = update(Job).where(Job.id.in_(job_ids), Job.state == JobState.QUEUED).values(sent_at=database_now(session))
    session.execute(statement.execution_options(synchronize_session=False))
