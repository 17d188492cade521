"""The only place that sets `Job.state`, together with what follows from each move."""

from __future__ import annotations

from datetime import datetime
from typing import NamedTuple

from sqlalchemy import select
from sqlalchemy.orm import Session

from cliprd_core.run_dir import ErrorReason, ErrorRecord
from service.store.models import Job, JobTeacher
from service.store.states import ALLOWED_MOVES, JobState


class QueuedJob(NamedTuple):
    """A job that became claimable; once the transaction is committed the caller sends its message."""

    job_id: str
    queue: str


def sources_of(target: JobState) -> list[JobState]:
    """The states that may move to `target`."""
    return [state for state, targets in ALLOWED_MOVES.items() if target in targets]


def move(job: Job, target: JobState, *, now: datetime) -> None:
    """Move a job whose row the caller has locked, and set what belongs to the move.

    Claiming is not done here but in one UPDATE (`leases.claim_job`), since two claimers race for an unlocked row.
    """
    assert target in ALLOWED_MOVES[job.state], f"job {job.id} can't go from {job.state} to {target}"
    job.state = target
    job.lease_token = None
    job.lease_expires_at = None
    if target is JobState.QUEUED:
        job.queued_at = now
        job.sent_at = None
    if target.is_finished:
        job.finished_at = now


def fail(job: Job, error: ErrorRecord, *, now: datetime) -> None:
    """Move a locked job to `failed` and record why."""
    move(job, JobState.FAILED, now=now)
    job.error = error.model_dump(mode="json")


def lose_attempt(*, session: Session, job: Job, error: ErrorRecord, now: datetime) -> list[QueuedJob]:
    """After a locked job's worker or training process vanished: queue the job again; or cancel it, if that was requested; or fail it
    with `error`, when this was the last attempt that may be lost.

    Returns:
        The job if it is queued again; send its message after the commit.
    """
    job.num_lost += 1
    if job.cancel_requested_at is not None:
        move(job, JobState.CANCELLED, now=now)
    elif num_lost_attempts(job) >= job.max_attempts:
        fail(job, error, now=now)
    else:
        move(job, JobState.QUEUED, now=now)
        return [QueuedJob(job.id, job.queue)]
    return settle_dependents(session=session, job=job, now=now)


def num_lost_attempts(job: Job) -> int:
    """Attempts that were not given back in good order, with the present one counted as lost."""
    return job.attempt - job.num_releases


def settle_dependents(*, session: Session, job: Job, now: datetime) -> list[QueuedJob]:
    """After `job` has finished: queue the jobs that waited for it as their last teacher, or fail them and whoever waits for them."""
    queued: list[QueuedJob] = []
    finished = [job]
    while finished:
        teacher = finished.pop()
        session.flush()
        for dependent in _lock_dependents(session, teacher):
            if teacher.state is JobState.SUCCEEDED:
                if _waits_for_another(session, dependent):
                    continue
                move(dependent, JobState.QUEUED, now=now)
                queued.append(QueuedJob(dependent.id, dependent.queue))
            else:
                message = (
                    f"The teacher of this job is the result of job {teacher.id}, which ended as {teacher.state}."
                    " Submit this job again with a teacher that exists."
                )
                fail(dependent, ErrorRecord(reason=ErrorReason.TEACHER_UNAVAILABLE, message=message), now=now)
                finished.append(dependent)
    session.flush()
    return queued


def _lock_dependents(session: Session, teacher: Job) -> list[Job]:
    students = select(JobTeacher.job_id).where(JobTeacher.teacher_job_id == teacher.id)
    query = select(Job).where(Job.id.in_(students), Job.state == JobState.WAITING).order_by(Job.id).with_for_update()
    return list(session.scalars(query.execution_options(populate_existing=True)))


def _waits_for_another(session: Session, dependent: Job) -> bool:
    """Whether a teacher of a locked job has yet to succeed. Of two that finish at once, the later one to lock the job sees both."""
    teachers = select(JobTeacher.teacher_job_id).where(JobTeacher.job_id == dependent.id)
    unfinished = select(Job.id).where(Job.id.in_(teachers), Job.state != JobState.SUCCEEDED).limit(1)
    return session.scalars(unfinished).first() is not None
