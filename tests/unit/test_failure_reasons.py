"""Exceptions as typed reasons, with advice."""

from __future__ import annotations

import errno
from typing import Any

import pytest
import torch
from torch.distributed import DistBackendError, DistNetworkError

from cliprd_core.failures import describe_failure
from cliprd_core.memory_advice import memory_advice
from cliprd_core.run_dir import ErrorReason, ErrorRecord
from cliprd_core.spec import JobSpec, merge_over
from service.store.failure_policy import FAILURE_POLICIES, what_to_do
from tests.store_helpers import spec_dict


def spec_with(**changes: Any) -> JobSpec:
    return JobSpec.model_validate(merge_over(spec_dict(training={"global_batch_size": 1000}), changes))


@pytest.mark.parametrize(
    ("spec", "advice"),
    [
        (spec_with(), "Set `training.micro_batch_size` to 500 "),
        (spec_with(resources={"num_processes": 4}), "Set `training.micro_batch_size` to 125 "),
        (spec_with(training={"micro_batch_size": 64}), "Set `training.micro_batch_size` to 32 "),
        (spec_with(training={"micro_batch_size": 4000}), "Set `training.micro_batch_size` to 500 "),
        (spec_with(training={"micro_batch_size": 1}), "Lower `training.global_batch_size`"),
    ],
)
def test_out_of_memory_suggests_half_of_what_went_through_at_once(spec: JobSpec, advice: str) -> None:
    record = describe_failure(MemoryError("too much"), spec)
    assert record.reason is ErrorReason.OUT_OF_MEMORY
    assert record.advice.startswith(advice)
    assert "too much" in record.message
    assert what_to_do(record) == f"{record.advice} {FAILURE_POLICIES[ErrorReason.OUT_OF_MEMORY].what_to_do}"


def test_a_gpu_that_ran_out_is_asked_how_much_this_process_may_have(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (3 * 2**30, 80 * 2**30))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 2**30)
    spec = spec_with(student={"config": None, "model": "ViT-B-32"}, training={"global_batch_size": 1024})
    advice = memory_advice(spec, 4 * 2**30)
    assert "fits by estimate" in advice
    assert describe_failure(torch.OutOfMemoryError("CUDA out of memory"), spec).advice == advice


@pytest.mark.parametrize("reason", list(ErrorReason))
def test_every_reason_says_what_to_do(reason: ErrorReason) -> None:
    text = what_to_do(ErrorRecord(reason=reason, message="so it is"))
    assert text == FAILURE_POLICIES[reason].what_to_do
    assert text[0].isupper()
    assert text.endswith(".")


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


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("[/src/gloo/transport/tcp/pair.cc:561] Connection closed by peer [10.0.0.2]:4000. Check the logs"),
        DistBackendError("NCCL error in: x.cpp:1, remote process exited\nncclRemoteError: A call failed possibly"),
        DistNetworkError("Connection reset by peer"),
    ],
)
def test_lost_contact_with_another_process_says_how_to_go_on(error: Exception) -> None:
    record = describe_failure(error)
    assert record.reason is ErrorReason.WORKER_LOST
    assert "its machine can no longer be reached" in record.message
    assert "resumes from its newest checkpoint" in record.advice
    assert str(error).splitlines()[0] in record.message


def killed_while_waiting() -> RuntimeError:
    error = RuntimeError("DataLoader worker (pid(s) 7) exited unexpectedly")
    error.__cause__ = RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. ")
    return error


@pytest.mark.parametrize("error", [RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. "), killed_while_waiting()])
def test_a_killed_loader_process_costs_an_attempt_only(error: Exception) -> None:
    record = describe_failure(error)
    assert record.reason is ErrorReason.WORKER_LOST
    assert "loads data was killed" in record.message
    assert "`training.num_data_workers`" in record.advice


def test_a_loader_process_that_crashed_is_internal() -> None:
    error = RuntimeError("DataLoader worker (pid 7) is killed by signal: Segmentation fault. ")
    assert describe_failure(error).reason is ErrorReason.INTERNAL


def test_other_errors_of_the_process_group_are_internal() -> None:
    assert describe_failure(DistBackendError("NCCL error: invalid usage")).reason is ErrorReason.INTERNAL
    assert describe_failure(RuntimeError("shapes do not match")).reason is ErrorReason.INTERNAL
