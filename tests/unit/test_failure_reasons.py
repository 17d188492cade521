"""Exceptions as typed reasons, with advice."""

from __future__ import annotations

import errno
from typing import Any

import pytest

from cliprd_core.failures import describe_failure
from cliprd_core.run_dir import ErrorReason
from cliprd_core.spec import JobSpec, merge_over
from tests.store_helpers import spec_dict


def spec_with(**changes: Any) -> JobSpec:
    return JobSpec.model_validate(merge_over(spec_dict(training={"global_batch_size": 1000}), changes))


@pytest.mark.parametrize(
    ("spec", "advice"),
    [
        (spec_with(), "set `training.micro_batch_size` to 500 "),
        (spec_with(resources={"num_processes": 4}), "set `training.micro_batch_size` to 125 "),
        (spec_with(training={"micro_batch_size": 64}), "set `training.micro_batch_size` to 32 "),
        (spec_with(training={"micro_batch_size": 4000}), "set `training.micro_batch_size` to 500 "),
        (spec_with(training={"micro_batch_size": 1}), "lower `training.global_batch_size`"),
    ],
)
def test_out_of_memory_suggests_half_of_what_went_through_at_once(spec: JobSpec, advice: str) -> None:
    record = describe_failure(MemoryError("too much"), spec)
    assert record.reason is ErrorReason.OUT_OF_MEMORY
    assert advice in record.message
    assert "too much" in record.message


def wrapped() -> RuntimeError:
    error = RuntimeError("could not save")
    error.__cause__ = OSError(errno.EDQUOT, "Disk quota exceeded")
    return error


@pytest.mark.parametrize(
    "error",
    [OSError(errno.ENOSPC, "No space left on device", "/x"), wrapped(), RuntimeError("I/O error: No space left on device (os error 28)")],
)
def test_a_full_disk_is_known_also_when_a_library_wraps_it(error: Exception) -> None:
    record = describe_failure(error)
    assert record.reason is ErrorReason.DISK_FULL
    assert "CLIPRD_RUNS_ROOT" in record.message


def test_other_system_errors_are_internal() -> None:
    assert describe_failure(OSError(errno.EACCES, "Permission denied")).reason is ErrorReason.INTERNAL
