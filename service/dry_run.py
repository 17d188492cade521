"""What a spec would become as a job, and what it would take: nothing is stored or sent."""

from __future__ import annotations

from functools import partial

from cliprd_core.model_size import ModelSize
from cliprd_core.spec import JobSpec
from service.dry_run_schemas import DryRunView, ModelSizeView
from service.estimates import device_warnings, memory_view, memory_warnings, queue_warnings, time_view
from service.file_walk import FileWalk, TooMuchToWalkError
from service.found_files import found_files
from service.model_sizes import Unknown, size_of_model, size_of_trained
from service.pair_counts import at_most_num_pairs, known_num_pairs, num_steps_of
from service.problems import BODY, FieldProblem, SpecError
from service.routes.dependencies import Services
from service.spec_check import WALK_LESS
from service.store.session import reading
from service.store.speeds import recorded_speeds
from service.store.states import JobState
from service.store.teachers import find_teachers_of, teacher_jobs
from service.store.workers import complaint_about_queue, list_workers


def dry_run(services: Services, spec: JobSpec) -> DryRunView:
    """What `submit` would make of the spec.

    Raises:
        SpecError: the spec has faults.
        TeacherUnavailableError: a teacher can't be had.
    """
    try:
        return _dry_run(services, spec, FileWalk())
    except TooMuchToWalkError as error:  # slower this time than when the spec was checked
        raise SpecError([FieldProblem(field=BODY, problem=str(error), remedy=WALK_LESS)]) from error


def _dry_run(services: Services, spec: JobSpec, walk: FileWalk) -> DryRunView:
    settings = services.settings
    resolved = services.preparation.check(spec)
    locations = settings.locations if settings.check_files else None
    with reading(services.sessions) as session:
        teachers = find_teachers_of(session, resolved)
        students = {field: job.spec["student"] for field, job in teacher_jobs(session=session, spec=resolved).items()}
        speeds = recorded_speeds(session=session, spec=resolved)
        workers = list_workers(session=session)
        nobody_takes_it = complaint_about_queue(session=session, queue=resolved.resources.queue)
    waits = not all(teacher.state.is_finished for teacher in teachers)
    num_pairs = known_num_pairs(resolved, partial(at_most_num_pairs, walk)) if settings.check_files else None
    num_steps = None if num_pairs is None else num_steps_of(resolved, num_pairs)
    sizes = {"student": size_of_model(resolved.student, locations)}
    for field, teacher in resolved.teacher_fields.items():
        sizes[field] = size_of_trained(students[field], locations) if field in students else size_of_model(teacher, locations)
    memory = memory_view(resolved, sizes)
    return DryRunView(
        state_if_submitted=JobState.WAITING if waits else JobState.QUEUED,
        spec=resolved.model_dump(mode="json"),
        num_pairs=num_pairs,
        num_steps=num_steps,
        teacher_job_ids=[teacher.job for teacher in resolved.teacher_fields.values() if teacher.job is not None],
        models=[_model_view(field, size) for field, size in sizes.items()],
        memory=memory,
        time=time_view(resolved, speeds, num_steps),
        warnings=[
            *queue_warnings(nobody_takes_it),
            *device_warnings(resolved, workers),
            *memory_warnings(resolved, memory.least_bytes, workers),
        ],
        files=found_files(walk, resolved) if settings.check_files else None,
    )


def _model_view(field: str, size: ModelSize | Unknown) -> ModelSizeView:
    if isinstance(size, Unknown):
        return ModelSizeView(
            field=field, image_parameters=None, text_parameters=None, other_parameters=None, total_parameters=None, reason=size.reason
        )
    return ModelSizeView(
        field=field,
        image_parameters=size.image.num_parameters,
        text_parameters=size.text.num_parameters,
        other_parameters=size.num_other,
        total_parameters=size.num_parameters,
        reason=None,
    )
