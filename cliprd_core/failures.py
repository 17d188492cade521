"""From an exception to error.json: which of the API's typed reasons it is, in words a user can act on."""

from __future__ import annotations

import errno
import os
import secrets
import signal
import traceback
from collections.abc import Iterator
from pathlib import Path

from pydantic import ValidationError

from cliprd_core.memory_advice import memory_advice
from cliprd_core.run_dir import DISK_FULL_ERRNOS, ERROR_FILE, ErrorReason, ErrorRecord, sync_directory
from cliprd_core.spec import JobSpec

MAX_DETAIL_CHARACTERS = 20_000


class InvalidSpecError(ValueError):
    """The spec asks for what cannot be; the message names the field and the remedy."""


class DivergedError(ArithmeticError):
    """The loss or the gradient is no longer a finite number; `advice` says what to do."""

    def __init__(self, message: str, advice: str) -> None:
        super().__init__(message)
        self.advice = advice


def describe_failure(error: BaseException, spec: JobSpec | None = None) -> ErrorRecord:
    """The record for `error`. The traceback always goes along: the reason may be misjudged.

    Args:
        error: what ended the run.
        spec: the run's, where it could be read: for advice in its numbers.
    """
    detail = "".join(traceback.format_exception(error))[-MAX_DETAIL_CHARACTERS:]
    reason = _reason(error)
    advice = error.advice if isinstance(error, DivergedError) else ""
    if reason is ErrorReason.OUT_OF_MEMORY:
        message = f"The training process ran out of memory ({_first_line(error)})."
        advice = memory_advice(spec, _device_bytes(error))
    elif reason is ErrorReason.DISK_FULL:
        message = f"A disk of the worker is full: {_first_line(error)}. Free space under its `CLIPRD_RUNS_ROOT`."
    elif isinstance(error, ValidationError):
        faults = [f"`{'.'.join(str(part) for part in fault['loc']) or 'spec'}`: {fault['msg']}" for fault in error.errors()]
        message = f"The job spec is not valid: {'; '.join(faults[:5])}"
    elif reason is ErrorReason.WORKER_LOST and _is_killed_loader(error):
        message = f"A process that loads data was killed, most likely because the machine ran out of memory ({_first_line(error)})."
        advice = "Lower `training.num_data_workers`, or use a worker with more memory."
    elif reason is ErrorReason.WORKER_LOST:
        message = f"Another training process of this run is gone, or its machine can no longer be reached ({_first_line(error)})."
        advice = "Its own log may say why. Started again, on all its machines, the run resumes from its newest checkpoint."
    elif reason is ErrorReason.INTERNAL:
        message = f"{type(error).__name__}: {_first_line(error)}"
    else:
        message = str(error)
    return ErrorRecord(reason=reason, message=message, advice=advice, detail=detail)


def _device_bytes(error: BaseException) -> int | None:
    """What the GPU that ran out of memory has for this process: what is free, and what it holds. None: it was no GPU."""
    import torch

    if not isinstance(error, torch.OutOfMemoryError) or not torch.cuda.is_available():
        return None
    try:
        free, _ = torch.cuda.mem_get_info()
    except RuntimeError:  # a device in such a state must not hide the error that is to be told
        return None
    return free + torch.cuda.memory_reserved()


def write_failure(run: Path, record: ErrorRecord) -> None:
    """Write error.json unless there is one: when one rank fails, the others fail of its absence, and the first to fail knows why."""
    path = run / ERROR_FILE
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")  # process ids repeat over machines
    temporary.write_text(record.model_dump_json(indent=1), encoding="utf-8")
    try:
        os.link(temporary, path)  # unlike a rename, fails where the file exists
        sync_directory(run)
    except FileExistsError:
        pass
    finally:
        temporary.unlink()


def _reason(error: BaseException) -> ErrorReason:
    from cliprd_core.data.errors import InvalidDataError

    if _is_disk_full(error):
        return ErrorReason.DISK_FULL
    if isinstance(error, InvalidDataError):
        return ErrorReason.INVALID_DATA
    if isinstance(error, InvalidSpecError | ValidationError):
        return ErrorReason.INVALID_SPEC
    if isinstance(error, DivergedError):
        return ErrorReason.DIVERGED
    if _is_out_of_memory(error):
        return ErrorReason.OUT_OF_MEMORY
    return ErrorReason.WORKER_LOST if _is_lost_contact(error) or _is_killed_loader(error) else ErrorReason.INTERNAL


def _is_disk_full(error: BaseException) -> bool:
    """Also where a library puts the system's error into one of its own: as its cause, or as words."""
    return any(
        (isinstance(one, OSError) and one.errno in DISK_FULL_ERRNOS) or os.strerror(errno.ENOSPC) in str(one) for one in _with_causes(error)
    )


def _with_causes(error: BaseException) -> Iterator[BaseException]:
    """The error, the one it came of, and so on."""
    current: BaseException | None = error
    while current is not None:
        yield current
        current = current.__cause__ or current.__context__


def _is_killed_loader(error: BaseException) -> bool:
    """Whether SIGKILL ended a loader process. torch raises it wherever the trainer is, from its handler of SIGCHLD: it may be wrapped."""
    phrase = f"is killed by signal: {signal.strsignal(signal.SIGKILL)}"
    return any(isinstance(one, RuntimeError) and phrase in str(one) for one in _with_causes(error))


def _is_out_of_memory(error: BaseException) -> bool:
    """torch has a class for CUDA only; its CPU allocator raises a bare RuntimeError."""
    import torch

    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(
        phrase in str(error) for phrase in ("DefaultCPUAllocator: can't allocate memory", "DefaultCPUAllocator: not enough memory")
    )


def _is_lost_contact(error: BaseException) -> bool:
    """Whether another process of the group could not be reached. Gloo raises a bare RuntimeError that names its own source file."""
    import torch.distributed as dist

    if isinstance(error, dist.DistNetworkError):  # the store through which processes meet
        return True
    return isinstance(error, RuntimeError) and any(phrase in str(error) for phrase in ("gloo/transport/", "ncclRemoteError"))


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [""])[0]
