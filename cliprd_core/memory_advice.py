"""What to change after a training process ran out of memory, in the numbers of its spec."""

from __future__ import annotations

import logging
from pathlib import Path

from cliprd_core.memory_estimate import estimate_memory, pairs_at_once
from cliprd_core.model_size import ModelSize, UnknownSizeError, size_of_config, size_of_known_model
from cliprd_core.spec import JobSpec, StudentSpec, TeacherSpec

logger = logging.getLogger(__name__)


def memory_advice(spec: JobSpec | None, device_bytes: int | None) -> str:
    """For the user of a run that ran out of memory.

    Args:
        spec: the run's; None: it could not be read.
        device_bytes: what the process's GPU has for it; None: it ran out of something else, or that isn't known.
    """
    others = "lower `training.global_batch_size`, use more processes, or a smaller model or teacher."
    at_once = 1 if spec is None else pairs_at_once(spec)
    if spec is None or at_once == 1:
        return others.capitalize()
    fitting = None if device_bytes is None else _fitting_micro_batches(spec, at_once, device_bytes)
    if fitting is None:
        return f"Set `training.micro_batch_size` to {at_once // 2} (it keeps the batch and its negatives), {others}"
    if not fitting:
        return f"By estimate no `training.micro_batch_size` is small enough: {others}"
    return f"Set `training.micro_batch_size` to {max(fitting)} (it keeps the batch and its negatives, and fits by estimate), {others}"


def _fitting_micro_batches(spec: JobSpec, at_once: int, device_bytes: int) -> list[int] | None:
    """The powers of two below `at_once` whose estimate fits; None where there is no estimate. What was tried is not among them, whatever
    its estimate: it did not fit. So who follows the advice again and again halves at least."""
    try:
        student = _size_of("student", spec.student)
        teachers = [_size_of(field, teacher) for field, teacher in spec.teacher_fields.items()]
        if not all(size.has_activations for size in (student, *teachers)):
            return None
        powers = [2**exponent for exponent in range((at_once - 1).bit_length())]
        return [power for power in powers if estimate_memory(_with_micro_batch(spec, power), student, teachers).total <= device_bytes]
    except UnknownSizeError:
        return None
    except Exception:  # advice must not take the place of the failure that it is about
        logger.exception("the memory that this run needs could not be estimated")
        return None


def _with_micro_batch(spec: JobSpec, size: int) -> JobSpec:
    return spec.model_copy(update={"training": spec.training.model_copy(update={"micro_batch_size": size})})


def _size_of(field: str, model: StudentSpec | TeacherSpec) -> ModelSize:
    if model.config is not None:
        return size_of_config(model.config)
    assert model.model is not None, "the worker has replaced jobs and artifacts by folders"
    from cliprd_core.models import LOCAL_DIR_PREFIX, read_local_dir  # which loads torch

    if model.model.startswith(LOCAL_DIR_PREFIX):
        config, _ = read_local_dir(field, Path(model.model.removeprefix(LOCAL_DIR_PREFIX)))
        return size_of_config(config)
    return size_of_known_model(model.model)
