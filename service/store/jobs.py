"""Jobs: submitting, reading, listing; and, gathered here from their modules, all that changes a job.

Callers import from this module; `session` is passed by keyword, and the caller commits (see `service.store.session`).
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from datetime import datetime

from sqlalchemy import Text, cast, func, insert, select
from sqlalchemy.orm import Session

from cliprd_core.spec import JobSpec
from service.store.control import (
    Changed,
    delete_job,
    deleted_among,
    labelled,
    request_cancel,
    request_pause,
    resume_job,
    retry_job,
    unfinished_jobs,
)
from service.store.cursors import Page, newest_page
from service.store.errors import (
    ArtifactNotFoundError,
    IdempotencyConflictError,
    InvalidCursorError,
    JobConflictError,
    JobFinishedError,
    JobNotFoundError,
    LeaseLostError,
    StoreError,
    TeacherUnavailableError,
)
from service.store.events import EventKind, NewEvent, record_events
from service.store.failure_policy import DEFAULT_MAX_ATTEMPTS
from service.store.leases import (
    Cancelled,
    Claim,
    Outcome,
    claim_job,
    claim_next,
    finish_job,
    mark_started,
    new_lease_token,
    record_checkpoint,
    release_job,
    renew_lease,
)
from service.store.metrics import record_evaluations, record_metrics
from service.store.models import Job, JobLabel, JobTeacher
from service.store.recovery import end_leases_of_others, jobs_to_send, mark_sent, num_to_send, requeue_expired, requeue_lost
from service.store.session import database_now
from service.store.states import ALLOWED_MOVES, JobState
from service.store.teachers import lock_teachers
from service.store.transitions import QueuedJob

__all__ = [
    "ALLOWED_MOVES",
    "ArtifactNotFoundError",
    "Cancelled",
    "Changed",
    "Claim",
    "IdempotencyConflictError",
    "InvalidCursorError",
    "JobConflictError",
    "JobFinishedError",
    "JobNotFoundError",
    "JobState",
    "LeaseLostError",
    "Outcome",
    "Page",
    "QueuedJob",
    "StoreError",
    "TeacherUnavailableError",
    "claim_job",
    "claim_next",
    "create_job",
    "create_jobs",
    "delete_job",
    "deleted_among",
    "end_leases_of_others",
    "finish_job",
    "get_job",
    "jobs_to_send",
    "list_jobs",
    "mark_sent",
    "mark_started",
    "new_lease_token",
    "num_to_send",
    "record_checkpoint",
    "record_evaluations",
    "record_metrics",
    "release_job",
    "renew_lease",
    "request_cancel",
    "request_pause",
    "requeue_expired",
    "requeue_lost",
    "resume_job",
    "retry_job",
    "unfinished_jobs",
]

MAX_PAGE_CHARACTERS = 4_000_000
"""Of the specs of a page of jobs: a usual one has a few thousand, the longest that is taken a million, and the reader holds them all."""


def create_job(*, session: Session, spec: JobSpec, max_attempts: int = DEFAULT_MAX_ATTEMPTS) -> Job:
    """Store a job, as `create_jobs` does.

    Raises:
        TeacherUnavailableError: a teacher can't be had.
    """
    [job] = create_jobs(session=session, specs=[spec], max_attempts=max_attempts)
    if isinstance(job, TeacherUnavailableError):
        raise job
    return job


def create_jobs(
    *, session: Session, specs: Sequence[JobSpec], max_attempts: int = DEFAULT_MAX_ATTEMPTS
) -> list[Job | TeacherUnavailableError]:
    """Store a job for each spec: `queued`, or `waiting` if a teacher is a job that hasn't finished; none for one whose teacher's job or
    artifact doesn't exist, or failed, or was cancelled, or is no model.

    `specs` are resolved: the worker takes their paths as they are.
    """
    if not specs:
        return []
    teachers = lock_teachers(session, specs)
    now = database_now(session)
    results: list[Job | TeacherUnavailableError] = [
        of_job if isinstance(of_job, TeacherUnavailableError) else _new_job(spec, of_job, max_attempts, now)
        for spec, of_job in zip(specs, teachers, strict=True)
    ]
    jobs = [job for job in results if isinstance(job, Job)]
    session.add_all(jobs)
    session.flush()
    labels = [{"job_id": job.id, "key": key, "value": value} for job in jobs for key, value in job.labels.items()]
    if labels:
        session.execute(insert(JobLabel), labels)
    had = [of_job for of_job in teachers if not isinstance(of_job, TeacherUnavailableError)]
    of_jobs = [{"job_id": job.id, "teacher_job_id": one.id} for job, of_job in zip(jobs, had, strict=True) for one in of_job]
    if of_jobs:
        session.execute(insert(JobTeacher), of_jobs)
    kinds = [(job, kind) for job in jobs for kind in (EventKind.CREATED, EventKind(job.state.value))]
    record_events(session, [NewEvent(job, kind) for job, kind in kinds], now=now)
    return results


def _new_job(spec: JobSpec, teachers: Sequence[Job], max_attempts: int, now: datetime) -> Job:
    waits = not all(teacher.state.is_finished for teacher in teachers)
    return Job(
        id=str(uuid.uuid4()),
        name=spec.name,
        recipe=spec.recipe.value,
        state=JobState.WAITING if waits else JobState.QUEUED,
        spec=spec.model_dump(mode="json"),
        queue=spec.resources.queue,
        priority=spec.resources.priority,
        attempt=0,
        num_releases=0,
        num_lost=0,  # as what has a default in the database would be read back, which takes longer than the insert
        max_attempts=max_attempts,
        created_at=now,
        queued_at=None if waits else now,
    )


def get_job(*, session: Session, job_id: str) -> Job:
    """The job of this id.

    Raises:
        JobNotFoundError: there is none.
    """
    job = session.get(Job, job_id)
    if job is None:
        raise JobNotFoundError(job_id)
    return job


def list_jobs(
    *,
    session: Session,
    state: JobState | None = None,
    labels: Mapping[str, str] | None = None,
    limit: int = 50,
    cursor: str | None = None,
) -> Page[Job]:
    """Jobs, newest first, that are in `state` and carry all of `labels`. A page of long specs ends before its limit.

    Raises:
        InvalidCursorError: the cursor is no earlier page's `next_cursor`.
    """
    query = select(Job)
    if state is not None:
        query = query.where(Job.state == state)
    query = labelled(query, labels or {})
    size = func.length(cast(Job.spec, Text))
    return newest_page(session, query, Job.created_at, Job.id, limit=limit, cursor=cursor, size=size, max_size=MAX_PAGE_CHARACTERS)
