"""The only place that sets `Job.state`, together with what follows from each move."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Any, NamedTuple

from sqlalchemy import select
from sqlalchemy.orm import Session

from cliprd_core.run_dir import ErrorReason, ErrorRecord
from service.store.attempt_counts import GIVEN_BACK
from service.store.events import EventKind, record_event
from service.store.failure_policy import FAILURE_POLICIES, what_to_do
from service.store.models import LOCK_ORDER, Job, JobTeacher
from service.store.states import ALLOWED_MOVES, JobState

GIVEN_BACK_MESSAGE = "Its worker gave it back in good order, as one does that is shut down. The attempt does not count as lost."


class QueuedJob(NamedTuple):
    """A job that became claimable; once the transaction is committed the caller sends its message."""

    job_id: str
    queue: str


def sources_of(target: JobState) -> list[JobState]:
    """The states that may move to `target`."""
    return [state for state, targets in ALLOWED_MOVES.items() if target in targets]


def move(job: Job, target: JobState, *, now: datetime, **data: Any) -> None:
    """Move a job whose row the caller has locked, and set what belongs to the move; `data` goes into its event.

    Claiming is not done here but in one UPDATE (`leases.claim_job`), since two claimers race for an unlocked row.
    """
    assert target in ALLOWED_MOVES[job.state], f"job {job.id} can't go from {job.state} to {target}"
    if job.state is JobState.RUNNING and job.attempt_started_at is not None:
        assert job.lease_expires_at is not None, "a running job has a lease"
        until = min(now, job.lease_expires_at)  # what comes after is not the job's: a clock set forward, or nobody looked
        job.seconds_run += max(0.0, (until - job.attempt_started_at).total_seconds())
    job.state = target
    job.lease_token = None
    job.lease_expires_at = None
    job.pause_requested_at = None
    if target is JobState.QUEUED:
        job.queued_at = now
        job.sent_at = None
    job.finished_at = now if target.is_finished else None
    record_event(job, EventKind(target.value), now=now, **data)


def fail(job: Job, error: ErrorRecord, *, now: datetime) -> None:
    """Move a locked job to `failed` and record why."""
    move(job, JobState.FAILED, now=now, reason=error.reason.value, message=error.message, what_to_do=what_to_do(error))
    job.error = error.model_dump(mode="json")


def end_badly(*, session: Session, job: Job, error: ErrorRecord, now: datetime, is_lease_lost: bool = False) -> list[QueuedJob]:
    """After a locked job's attempt failed: do what `FAILURE_POLICIES` says of the reason. A job that is to be tried again is queued; or
    cancelled or left paused, if that was requested; or failed, when this was the last attempt that may be lost.

    Args:
        is_lease_lost: Whether nobody reported the error: the attempt's lease ran out.

    Returns:
        Jobs that are claimable by this, now; send their messages after the commit. One that is to wait is sent by the reaper.
    """
    policy = FAILURE_POLICIES[error.reason]
    if is_lease_lost:
        record_event(job, EventKind.LEASE_LOST, now=now, worker=job.worker)
    elif policy.is_retried:
        record_event(job, EventKind.ATTEMPT_LOST, now=now, worker=job.worker, reason=error.reason.value, message=error.message)
    if not policy.is_retried:
        fail(job, error, now=now)
    elif job.cancel_requested_at is not None:
        move(job, JobState.CANCELLED, now=now)
    elif num_lost_attempts(job) >= job.max_attempts:
        fail(job, error, now=now)
    elif job.pause_requested_at is not None:
        move(job, JobState.PAUSED, now=now)
        return []
    else:
        move(job, JobState.QUEUED, now=now, reason=error.reason.value, message=error.message, delay_seconds=policy.delay_seconds)
        job.queued_at = now + timedelta(seconds=policy.delay_seconds)
        return [] if policy.delay_seconds else [QueuedJob(job.id, job.queue)]
    return settle_dependents(session=session, job=job, now=now)


def num_lost_attempts(job: Job) -> int:
    """Attempts that did not end in good order, with the present one counted as lost."""
    return job.attempt - job.num_releases


def give_back(*, session: Session, job: Job, now: datetime) -> list[QueuedJob]:
    """End a locked job's attempt in good order, so that it doesn't count as lost: the job is queued again; or cancelled or paused,
    if that was requested.

    Returns:
        The job if it is queued again; send its message after the commit.
    """
    job.num_releases += 1
    if job.cancel_requested_at is not None:
        move(job, JobState.CANCELLED, now=now)
        return settle_dependents(session=session, job=job, now=now)
    if job.pause_requested_at is not None:
        move(job, JobState.PAUSED, now=now)
        return []
    move(job, JobState.QUEUED, now=now, reason=GIVEN_BACK, message=GIVEN_BACK_MESSAGE)
    return [QueuedJob(job.id, job.queue)]


def settle_dependents(*, session: Session, job: Job, now: datetime) -> list[QueuedJob]:
    """After `job` has finished: queue the jobs that waited for it as their last teacher, or fail them and whoever waits for them."""
    queued: list[QueuedJob] = []
    finished = [job]
    while finished:
        teacher = finished.pop()
        session.flush()
        for dependent in _lock_dependents(session, teacher):
            if teacher.state is JobState.SUCCEEDED:
                if dependent.state is JobState.PAUSED or waits_for_a_teacher(session, dependent):
                    continue
                move(dependent, JobState.QUEUED, now=now)
                queued.append(QueuedJob(dependent.id, dependent.queue))
            else:
                message = f"The teacher of this job is the result of job {teacher.id}, which ended as {teacher.state}."
                fail(dependent, ErrorRecord(reason=ErrorReason.TEACHER_UNAVAILABLE, message=message), now=now)
                finished.append(dependent)
    session.flush()
    return queued


def _lock_dependents(session: Session, teacher: Job) -> list[Job]:
    students = select(JobTeacher.job_id).where(JobTeacher.teacher_job_id == teacher.id)
    query = select(Job).where(Job.id.in_(students), Job.state.in_((JobState.WAITING, JobState.PAUSED)))
    query = query.order_by(*LOCK_ORDER).with_for_update()
    return list(session.scalars(query.execution_options(populate_existing=True)))


def waits_for_a_teacher(session: Session, dependent: Job) -> bool:
    """Whether a teacher of a locked job has yet to succeed. Of two that finish at once, the later one to lock the job sees both."""
    teachers = select(JobTeacher.teacher_job_id).where(JobTeacher.job_id == dependent.id)
    unfinished = select(Job.id).where(Job.id.in_(teachers), Job.state != JobState.SUCCEEDED).limit(1)
    return session.scalars(unfinished).first() is not None
