"""Teachers that are other jobs' results: whether they can be had."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from sqlalchemy import Select, select
from sqlalchemy.orm import Session

from cliprd_core.spec import JobSpec
from service.store.errors import TeacherUnavailableError
from service.store.kinds import ArtifactKind
from service.store.models import LOCK_ORDER, Artifact, Job
from service.store.states import JobState


def lock_teachers(session: Session, specs: Sequence[JobSpec]) -> list[list[Job] | TeacherUnavailableError]:
    """Of each spec the jobs whose results are teachers, locked so that they can't finish or be deleted between our look and our insert; or
    why a teacher can't be had: its job or artifact doesn't exist, or failed, or was cancelled, or is no model."""
    return _teachers(session, specs, select(Job).order_by(*LOCK_ORDER).with_for_update())


def lock_teachers_of(session: Session, spec: JobSpec) -> list[Job]:
    """As `lock_teachers`, of one spec.

    Raises:
        TeacherUnavailableError: a teacher can't be had.
    """
    return _or_raise(lock_teachers(session, [spec]))


def find_teachers_of(session: Session, spec: JobSpec) -> list[Job]:
    """The same for who only reads: nothing is locked, nor waited for.

    Raises:
        TeacherUnavailableError: a teacher can't be had.
    """
    return _or_raise(_teachers(session, [spec], select(Job)))


def _or_raise(of_one: list[list[Job] | TeacherUnavailableError]) -> list[Job]:
    [teachers] = of_one
    if isinstance(teachers, TeacherUnavailableError):
        raise teachers
    return teachers


def _teachers(session: Session, specs: Sequence[JobSpec], query: Select[Job]) -> list[list[Job] | TeacherUnavailableError]:
    fields_of_specs = [_fields_of_jobs(session, spec) for spec in specs]
    job_ids = {job_id for one in fields_of_specs if isinstance(one, dict) for job_id in one}
    if not job_ids:
        return [one if isinstance(one, TeacherUnavailableError) else [] for one in fields_of_specs]
    found = session.scalars(query.where(Job.id.in_(job_ids)).execution_options(populate_existing=True))
    by_id = {job.id: job for job in found}
    return [one if isinstance(one, TeacherUnavailableError) else _available(by_id, one) for one in fields_of_specs]


def _fields_of_jobs(session: Session, spec: JobSpec) -> dict[str, str] | TeacherUnavailableError:
    """By the id of each job whose result is a teacher, the spec's field that names it."""
    found: dict[str, str] = {}
    try:
        for field, teacher in spec.teacher_fields.items():
            if teacher.artifact is not None:
                found.setdefault(_job_of_artifact(session, f"{field}.artifact", teacher.artifact), f"{field}.artifact")
            elif teacher.job is not None:
                found.setdefault(teacher.job, f"{field}.job")
    except TeacherUnavailableError as error:
        return error
    return found


def _available(jobs: Mapping[str, Job], fields_of_jobs: Mapping[str, str]) -> list[Job] | TeacherUnavailableError:
    found = []
    for job_id, field in fields_of_jobs.items():
        job = jobs.get(job_id)
        if job is None:
            return TeacherUnavailableError(field, f"there is no job {job_id!r}")
        if job.state in (JobState.FAILED, JobState.CANCELLED):
            return TeacherUnavailableError(field, f"job {job_id!r} ended as {job.state}, so it has no model to offer")
        found.append(job)
    return found


def teacher_jobs(*, session: Session, spec: JobSpec) -> dict[str, Job]:
    """By the spec's field, the jobs whose results are teachers, of a spec whose teachers can be had."""
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
