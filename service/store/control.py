"""What users ask of jobs that exist: cancel, pause, resume, retry, delete."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import NamedTuple, TypeVar

from pydantic import ValidationError
from sqlalchemy import Select, delete, select
from sqlalchemy.orm import Session

from cliprd_core.spec import JobSpec
from service.store.errors import JobConflictError, JobFinishedError, JobNotFoundError
from service.store.events import EventKind, record_event
from service.store.models import LOCK_ORDER, Artifact, DeletedJob, Job, JobLabel, JobTeacher
from service.store.session import database_now
from service.store.states import JobState
from service.store.teachers import lock_teachers_of
from service.store.transitions import QueuedJob, move, settle_dependents, waits_for_a_teacher
from service.store.unneeded_blobs import note_unneeded

FINISHED_STATES = [state for state in JobState if state.is_finished]

AnyColumns = TypeVar("AnyColumns")


class Changed(NamedTuple):
    """A job after a request, and the message to send after the commit if it became claimable by it."""

    job: Job
    queued: list[QueuedJob]


def request_cancel(*, session: Session, job_id: str, now: datetime | None = None) -> Job:
    """End a job that hasn't started at once; ask the worker of a running one, which looks for that every second or so.

    Asking twice is the same as asking once. Jobs that wait for this one as their teacher fail with it.

    Raises:
        JobNotFoundError: there is no such job.
        JobFinishedError: it has succeeded or failed.
    """
    job = _lock(session, job_id)
    if job.state is JobState.CANCELLED:
        return job
    _refuse_finished(job)
    now = now or database_now(session)
    if job.cancel_requested_at is None:
        job.cancel_requested_at = now
        record_event(job, EventKind.CANCEL_REQUESTED, now=now)
    if job.state is not JobState.RUNNING:
        move(job, JobState.CANCELLED, now=now)
        settle_dependents(session=session, job=job, now=now)
    session.flush()
    return job


def request_pause(*, session: Session, job_id: str) -> Job:
    """Put a job aside that hasn't started, at once; ask the worker of a running one to save a checkpoint and give it back.

    Asking twice is the same as asking once.

    Raises:
        JobNotFoundError: there is no such job.
        JobFinishedError: it has finished, whichever way.
        JobConflictError: it is being cancelled.
    """
    job = _lock(session, job_id)
    _refuse_finished(job)
    if job.cancel_requested_at is not None:
        raise JobConflictError(job_id, "is being cancelled, so it can't be paused")
    now = database_now(session)
    if job.state is JobState.RUNNING:
        if job.pause_requested_at is None:
            job.pause_requested_at = now
            record_event(job, EventKind.PAUSING, now=now)
    elif job.state is not JobState.PAUSED:
        move(job, JobState.PAUSED, now=now)
    session.flush()
    return job


def resume_job(*, session: Session, job_id: str) -> Changed:
    """Let a paused job go on: `queued`, or `waiting` if a teacher of it is a job that hasn't finished. A job that is not paused stays
    as it is; where its worker was asked to pause it, that is taken back, and if it has stopped already the job is queued again.

    Raises:
        JobNotFoundError: there is no such job.
        JobFinishedError: it has finished, whichever way.
        JobConflictError: it is being cancelled.
    """
    _lock_teachers_of(session, job_id)
    job = _lock(session, job_id)
    _refuse_finished(job)
    if job.cancel_requested_at is not None:
        raise JobConflictError(job_id, "is being cancelled, so it can't be resumed")
    now = database_now(session)
    if job.state is JobState.PAUSED or job.pause_requested_at is not None:
        record_event(job, EventKind.RESUMED, now=now)
    job.pause_requested_at = None
    queued: list[QueuedJob] = []
    if job.state is JobState.PAUSED:
        waits = waits_for_a_teacher(session, job)
        move(job, JobState.WAITING if waits else JobState.QUEUED, now=now)
        queued = [] if waits else [QueuedJob(job.id, job.queue)]
    session.flush()
    return Changed(job, queued)


def retry_job(*, session: Session, job_id: str) -> Changed:
    """Try a failed or cancelled job again, from its newest checkpoint where it has one. Attempts lost before don't count any more.

    Raises:
        JobNotFoundError: there is no such job.
        JobConflictError: it is neither failed nor cancelled, or this version does not take its spec.
        TeacherUnavailableError: a teacher of it can't be had any more.
    """
    before = session.get(Job, job_id)
    if before is None:
        raise JobNotFoundError(job_id)
    try:
        spec = JobSpec.model_validate(before.spec)
    except ValidationError as error:
        raise JobConflictError(job_id, "has a spec that this version does not take any more; submit a new one") from error
    teachers = lock_teachers_of(session, spec)
    job = _lock(session, job_id)
    if job.state not in (JobState.FAILED, JobState.CANCELLED):
        raise JobConflictError(job_id, f"is {job.state}; only a failed or cancelled job can be tried again")
    waits = not all(teacher.state is JobState.SUCCEEDED for teacher in teachers)
    now = database_now(session)
    record_event(job, EventKind.RETRIED, now=now)
    move(job, JobState.WAITING if waits else JobState.QUEUED, now=now)
    job.error = None
    job.cancel_requested_at = None
    job.num_releases = job.attempt
    job.seconds_run = 0.0
    session.flush()
    return Changed(job, [] if waits else [QueuedJob(job.id, job.queue)])


def delete_job(*, session: Session, job_id: str) -> None:
    """Forget a finished job with all that is known of it. A worker's cleaner deletes its artifacts' bytes after the commit.

    Raises:
        JobNotFoundError: there is no such job.
        JobConflictError: it has not finished, or it is a teacher of a job that hasn't.
    """
    job = _lock(session, job_id)
    if not job.state.is_finished:
        raise JobConflictError(job_id, f"is {job.state}; only a finished job can be deleted, so cancel it first")
    students = select(JobTeacher.job_id).where(JobTeacher.teacher_job_id == job_id)
    waiting = session.scalars(select(Job.id).where(Job.id.in_(students), Job.state.not_in(FINISHED_STATES)).limit(1)).first()
    if waiting is not None:
        raise JobConflictError(job_id, f"is a teacher of job {waiting}, which has not finished")
    keys = list(session.scalars(select(Artifact.storage_key).where(Artifact.job_id == job_id)))
    note_unneeded(session=session, storage_keys=keys)
    session.execute(delete(JobTeacher).where(JobTeacher.teacher_job_id == job_id))
    session.delete(job)
    session.add(DeletedJob(id=job_id, deleted_at=database_now(session)))
    session.flush()


def deleted_among(*, session: Session, job_ids: Sequence[str]) -> set[str]:
    """Those of the ids that were jobs' and whose jobs were deleted. A job that is there after all, as in a restored table, was not."""
    is_there = select(Job.id).where(Job.id == DeletedJob.id).exists()
    return set(session.scalars(select(DeletedJob.id).where(DeletedJob.id.in_(job_ids), ~is_there)))


def unfinished_jobs(*, session: Session, labels: Mapping[str, str]) -> list[str]:
    """Ids of jobs that carry all of `labels` and have not finished, newest first: students come before their teachers."""
    query = labelled(select(Job.id), labels).where(Job.state.not_in(FINISHED_STATES))
    return list(session.scalars(query.order_by(Job.created_at.desc(), Job.id.desc())))


def labelled(query: Select[AnyColumns], labels: Mapping[str, str]) -> Select[AnyColumns]:
    """`query`, a selection of jobs, narrowed down to those that carry all of `labels`."""
    for key, value in labels.items():
        query = query.where(Job.id.in_(select(JobLabel.job_id).where(JobLabel.key == key, JobLabel.value == value)))
    return query


def _lock_teachers_of(session: Session, job_id: str) -> None:
    """Before the job itself, as whoever finishes a teacher does, so that none can finish between our look and our move."""
    teachers = select(JobTeacher.teacher_job_id).where(JobTeacher.job_id == job_id)
    session.execute(select(Job.id).where(Job.id.in_(teachers)).order_by(*LOCK_ORDER).with_for_update())


def _refuse_finished(job: Job) -> None:
    if job.state.is_finished:
        raise JobFinishedError(job.id, job.state)


def _lock(session: Session, job_id: str) -> Job:
    query = select(Job).where(Job.id == job_id).with_for_update().execution_options(populate_existing=True)
    job = session.scalars(query).one_or_none()
    if job is None:
        raise JobNotFoundError(job_id)
    return job
