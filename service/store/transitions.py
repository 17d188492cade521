"""The only place that sets `Job.state`, together with what follows from each move."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any, NamedTuple

from sqlalchemy import select
from sqlalchemy.orm import Session

from cliprd_core.run_dir import ErrorReason, ErrorRecord
from service.store.attempt_counts import GIVEN_BACK
from service.store.events import EventKind, NewEvent, record_event, record_events, session_of
from service.store.failure_policy import FAILURE_POLICIES, what_to_do
from service.store.models import LOCK_ORDER, Job, JobTeacher
from service.store.states import ALLOWED_MOVES, JobState

GIVEN_BACK_MESSAGE = "Its worker gave it back in good order, as one does that is shut down. The attempt does not count as lost."

MAX_IDS = 10_000
"""In one statement; PostgreSQL takes 65,535 parameters, SQLite 32,766 or more."""


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
    _set_state(job, target, now=now)
    record_event(job, EventKind(target.value), now=now, **data)


def _set_state(job: Job, target: JobState, *, now: datetime) -> None:
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


def fail(job: Job, error: ErrorRecord, *, now: datetime) -> None:
    """Move a locked job to `failed` and record why."""
    record_events(session_of(job), [_fail(job, error, now=now)], now=now)


def _fail(job: Job, error: ErrorRecord, *, now: datetime) -> NewEvent:
    """The event that is to be recorded of it."""
    _set_state(job, JobState.FAILED, now=now)
    job.error = error.model_dump(mode="json")
    return NewEvent(job, EventKind.FAILED, {"reason": error.reason.value, "message": error.message, "what_to_do": what_to_do(error)})


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
    """After `job` has finished: queue the jobs that waited for it as their last teacher, or fail them and whoever waits for them.

    A few statements for all of them, since their rows are locked, and submissions that name the same teacher wait, until the commit.
    """
    session.flush()
    dependents = _lock_dependents(session, [job.id])
    if job.state is JobState.SUCCEEDED:
        waiting = _unready(session, dependents)
        ready = [dependent for dependent in dependents if dependent.state is JobState.WAITING and dependent.id not in waiting]
        for dependent in ready:
            _set_state(dependent, JobState.QUEUED, now=now)
        record_events(session, [NewEvent(dependent, EventKind.QUEUED) for dependent in ready], now=now)
        session.flush()
        return [QueuedJob(dependent.id, dependent.queue) for dependent in ready]
    lost: Mapping[str, Job] = {job.id: job}
    while dependents:
        teacher_of = _teacher_of(session, [*lost])
        record_events(session, [_fail(one, _without(lost[teacher_of[one.id]]), now=now) for one in dependents], now=now)
        session.flush()
        lost = {dependent.id: dependent for dependent in dependents}
        dependents = _lock_dependents(session, [*lost])
    return []


def _without(teacher: Job) -> ErrorRecord:
    message = f"The teacher of this job is the result of job {teacher.id}, which ended as {teacher.state}."
    return ErrorRecord(reason=ErrorReason.TEACHER_UNAVAILABLE, message=message)


def _lock_dependents(session: Session, teacher_ids: Sequence[str]) -> list[Job]:
    found: list[Job] = []
    for some in _in_parts(teacher_ids):
        students = select(JobTeacher.job_id).where(JobTeacher.teacher_job_id.in_(some))
        query = select(Job).where(Job.id.in_(students), Job.state.in_((JobState.WAITING, JobState.PAUSED)))
        found += session.scalars(query.order_by(*LOCK_ORDER).with_for_update().execution_options(populate_existing=True))
    return list(dict.fromkeys(found))


def _teacher_of(session: Session, teacher_ids: Sequence[str]) -> dict[str, str]:
    """By the id of each job that has any of these teachers, one of them."""
    found: dict[str, str] = {}
    for some in _in_parts(teacher_ids):
        pairs = select(JobTeacher.job_id, JobTeacher.teacher_job_id).where(JobTeacher.teacher_job_id.in_(some))
        found |= {pair.job_id: pair.teacher_job_id for pair in session.execute(pairs)}
    return found


def _in_parts(ids: Sequence[str]) -> Iterator[Sequence[str]]:
    """No more of them at once than any database takes in a statement."""
    return (ids[start : start + MAX_IDS] for start in range(0, len(ids), MAX_IDS))


def waits_for_a_teacher(session: Session, dependent: Job) -> bool:
    """Whether a teacher of a locked job has yet to succeed. Of two that finish at once, the later one to lock the job sees both."""
    return bool(_unready(session, [dependent]))


def _unready(session: Session, jobs: Sequence[Job]) -> set[str]:
    """Ids of those of which a teacher has yet to succeed."""
    query = select(JobTeacher.job_id).join(Job, Job.id == JobTeacher.teacher_job_id).where(Job.state != JobState.SUCCEEDED)
    parts = _in_parts([job.id for job in jobs])
    return {job_id for some in parts for job_id in session.scalars(query.where(JobTeacher.job_id.in_(some)))}
