"""Submitting a job: checked, stored, sent; once for each idempotency key."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastapi.concurrency import run_in_threadpool
from pydantic import ValidationError

from cliprd_core.spec import JobSpec, merge_over
from service.intake import Submission, Submitted
from service.problems import FieldProblem, SpecError, problems_of
from service.routes.dependencies import Services
from service.spec_check import check_parts, check_spec, check_values
from service.store.errors import IdempotencyConflictError
from service.store.idempotency import Keyed, digest, find_submitted
from service.store.models import Job
from service.store.session import reading


async def submit(services: Services, spec: JobSpec, *, key: str | None = None) -> Submitted:
    """The job of this spec, stored and sent.

    Raises:
        SpecError: the spec has faults.
        TeacherUnavailableError: a teacher can't be had.
        IdempotencyConflictError: the key was used for another spec.
    """
    submission = await run_in_threadpool(_prepare, services, spec, key)
    return submission if isinstance(submission, Submitted) else await services.intake.take(submission)


def _prepare(services: Services, spec: JobSpec, key: str | None) -> Submission | Submitted:
    """What is to be stored; or the job that was stored under this key before, if what the spec names is not there any more."""
    try:
        resolved = checked(services, spec)
    except SpecError:
        if key is None:
            raise
        check_values(spec)  # what has no JSON can't be compared with what was sent before
        keyed = Keyed(key, digest(spec))
        with reading(services.sessions) as session:
            earlier = find_submitted(session=session, submissions=[keyed]).get(keyed)
        if earlier is None:
            raise
        if isinstance(earlier, IdempotencyConflictError):
            raise earlier from None
        return Submitted(earlier, is_replayed=True)
    return Submission(resolved, None if key is None else Keyed(key, digest(spec)))


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
