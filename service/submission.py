"""Submitting a job: checked, stored, sent; once for each idempotency key."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from cliprd_core.spec import JobSpec, merge_over
from service.intake import Submitted
from service.problems import FieldProblem, SpecError, problems_of
from service.routes.dependencies import Services
from service.spec_check import check_parts
from service.store.jobs import QueuedJob
from service.store.models import Job
from service.store.states import JobState


async def submit(services: Services, spec: JobSpec, *, key: str | None = None) -> Submitted:
    """The job of this spec, stored; it is sent to the workers soon.

    Raises:
        SpecError: the spec has faults.
        TeacherUnavailableError: a teacher can't be had.
        IdempotencyConflictError: the key was used for another spec.
    """
    submission = await services.preparation.prepare(spec, key)
    if isinstance(submission, Submitted):
        return submission
    submitted = await services.intake.take(submission)
    if not submitted.is_replayed and submitted.job.state is JobState.QUEUED:
        services.messages.send_soon(QueuedJob(submitted.job.id, submitted.job.queue))
    return submitted


def problems_of_parts(services: Services, body: Any) -> list[FieldProblem]:
    """What is wrong with the sound parts of a body that is no spec as a whole, so that its sender hears of that in the same answer."""
    if not isinstance(body, dict):
        return []
    settings = services.settings
    return check_parts(body, data_root=settings.data_root, locations=settings.locations, check_files=settings.check_files)


def cloned_spec(services: Services, job: Job, overrides: Mapping[str, Any]) -> JobSpec:
    """A job's stored spec with some fields replaced, object by object; a label that is replaced by null is removed.

    Raises:
        SpecError: what comes out is no spec.
    """
    recipe = overrides.get("recipe", job.recipe)
    if recipe != job.recipe:
        problem = f"can't be changed from {job.recipe!r}: it gives defaults, and the stored spec has every field set"
        raise SpecError([FieldProblem(field="recipe", problem=problem, remedy="Leave it out, or submit a spec of its own.")])
    body = merge_over(job.spec, dict(overrides))
    if isinstance(labels := body.get("labels"), dict):
        body["labels"] = {key: value for key, value in labels.items() if value is not None}
    try:
        return JobSpec.model_validate(body)
    except ValidationError as error:
        raise SpecError([*problems_of(error.errors(), JobSpec), *problems_of_parts(services, body)]) from error
