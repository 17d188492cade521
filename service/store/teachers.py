"""Teachers that are other jobs' results: whether they can be had."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from sqlalchemy import select
from sqlalchemy.orm import Session

from cliprd_core.spec import JobSpec
from service.store.errors import TeacherUnavailableError
from service.store.models import Artifact, ArtifactKind, Job
from service.store.states import JobState


def lock_teachers(session: Session, specs: Sequence[JobSpec]) -> list[list[Job]]:
    """Of each spec the jobs whose results are teachers, locked so that they can't finish or be deleted between our look and our insert.

    Raises:
        TeacherUnavailableError: a teacher's job or artifact doesn't exist, or failed, or was cancelled, or is no model.
    """
    fields_of_specs = [_fields_of_jobs(session, spec) for spec in specs]
    job_ids = {job_id for fields_of_jobs in fields_of_specs for job_id in fields_of_jobs}
    if not job_ids:
        return [[] for _ in specs]
    # In the order of their ids, as everyone locks several jobs.
    query = select(Job).where(Job.id.in_(job_ids)).order_by(Job.id).with_for_update()
    locked = {job.id: job for job in session.scalars(query.execution_options(populate_existing=True))}
    return [[_available(locked, job_id, field) for job_id, field in one.items()] for one in fields_of_specs]


def _fields_of_jobs(session: Session, spec: JobSpec) -> dict[str, str]:
    """By the id of each job whose result is a teacher, the spec's field that names it."""
    found: dict[str, str] = {}
    for field, teacher in spec.teacher_fields.items():
        if teacher.artifact is not None:
            found.setdefault(_job_of_artifact(session, f"{field}.artifact", teacher.artifact), f"{field}.artifact")
        elif teacher.job is not None:
            found.setdefault(teacher.job, f"{field}.job")
    return found


def _available(jobs: Mapping[str, Job], job_id: str, field: str) -> Job:
    job = jobs.get(job_id)
    if job is None:
        raise TeacherUnavailableError(field, f"there is no job {job_id!r}")
    if job.state in (JobState.FAILED, JobState.CANCELLED):
        raise TeacherUnavailableError(field, f"job {job_id!r} ended as {job.state}, so it has no model to offer")
    return job


def teacher_jobs(*, session: Session, spec: JobSpec) -> dict[str, Job]:
    """By the spec's field, the jobs whose results are teachers, of a spec whose teachers can be had (`lock_teachers`)."""
    found = {}
    for field, teacher in spec.teacher_fields.items():
        job_id = teacher.job if teacher.artifact is None else _job_of_artifact(session, f"{field}.artifact", teacher.artifact)
        if job_id is not None:
            found[field] = session.get_one(Job, job_id)
    return found


def _job_of_artifact(session: Session, field: str, artifact_id: str) -> str:
    artifact = session.get(Artifact, artifact_id)
    if artifact is None:
        raise TeacherUnavailableError(field, f"there is no artifact {artifact_id!r}")
    if artifact.kind is not ArtifactKind.MODEL:
        raise TeacherUnavailableError(field, f"artifact {artifact.id!r} is a {artifact.kind}, not a model")
    return artifact.job_id
