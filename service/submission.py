"""Submitting a job: checked, stored, sent; once for each idempotency key."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import ValidationError
from sqlalchemy.exc import IntegrityError

from cliprd_core.spec import JobSpec, merge_over
from service.problems import FieldProblem, SpecError, problems_of
from service.routes.dependencies import Services
from service.spec_check import check_parts, check_spec, check_values
from service.store import jobs
from service.store.idempotency import find_submitted, remember_key
from service.store.jobs import QueuedJob
from service.store.models import Job
from service.store.session import reading
from service.store.states import JobState


def submit(services: Services, spec: JobSpec, *, key: str | None = None) -> tuple[Job, bool]:
    """The job of this spec, and whether it was there before.

    Raises:
        SpecError: the spec has faults.
        TeacherUnavailableError: a teacher can't be had.
        IdempotencyConflictError: the key was used for another spec.
    """
    if key is not None:
        check_values(spec)  # what has no JSON can't be compared with what was sent before
        earlier = _find(services, key, spec)
        if earlier is not None:
            return earlier, True
    resolved = checked(services, spec)
    try:
        with services.sessions.begin() as session:
            job = jobs.create_job(session=session, spec=resolved, max_attempts=services.settings.max_attempts)
            if key is not None:
                remember_key(session=session, key=key, spec=spec, job=job)
    except IntegrityError:  # someone was faster with the same key
        earlier = None if key is None else _find(services, key, spec)
        if earlier is None:
            raise
        return earlier, True
    if job.state is JobState.QUEUED:
        send(services, [QueuedJob(job.id, job.queue)])
    return job, False


def checked(services: Services, spec: JobSpec) -> JobSpec:
    """The spec as it runs.

    Raises:
        SpecError: it has faults, or names what jobs may not read.
    """
    settings = services.settings
    return check_spec(spec, data_root=settings.data_root, locations=settings.locations, check_files=settings.check_files)


def problems_of_parts(services: Services, body: Any) -> list[FieldProblem]:
    """What is wrong with the sound parts of a body that is no spec as a whole, so that its sender hears of that in the same answer."""
    if not isinstance(body, dict):
        return []
    settings = services.settings
    return check_parts(body, data_root=settings.data_root, locations=settings.locations, check_files=settings.check_files)


def _find(services: Services, key: str, spec: JobSpec) -> Job | None:
    with reading(services.sessions) as session:
        return find_submitted(session=session, key=key, spec=spec)


def send(services: Services, queued: Sequence[QueuedJob]) -> None:
    """Send the messages of jobs that became claimable; what the broker does not take, the reaper sends later."""
    sent = [job.job_id for job in queued if services.queue.send(job.job_id, job.queue)]
    if sent:
        with services.sessions.begin() as session:
            jobs.mark_sent(session=session, job_ids=sent)


def cloned_spec(services: Services, job: Job, overrides: Mapping[str, Any]) -> JobSpec:
    """A job's stored spec with some fields replaced, object by object.

    Raises:
        SpecError: what comes out is no spec.
    """
    recipe = overrides.get("recipe", job.recipe)
    if recipe != job.recipe:
        problem = f"can't be changed from {job.recipe!r}: it gives defaults, and the stored spec has every field set"
        raise SpecError([FieldProblem(field="recipe", problem=problem, remedy="Leave it out, or submit a spec of its own.")])
    body = merge_over(job.spec, dict(overrides))
    try:
        return JobSpec.model_validate(body)
    except ValidationError as error:
        raise SpecError([*problems_of(error.errors(), JobSpec), *problems_of_parts(services, body)]) from error
