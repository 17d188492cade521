"""From an exception to error.json: which of the API's typed reasons it is, in words a user can act on."""

from __future__ import annotations

import os
import traceback
from pathlib import Path

from pydantic import ValidationError

from cliprd_core.run_dir import ERROR_FILE, ErrorReason, ErrorRecord, sync_directory

MAX_DETAIL_CHARACTERS = 20_000


class InvalidSpecError(ValueError):
    """The spec asks for what cannot be; the message names the field and the remedy."""


class DivergedError(ArithmeticError):
    """The loss or the gradient is no longer a finite number."""


def describe_failure(error: BaseException) -> ErrorRecord:
    """The record for `error`. The traceback always goes along: the reason may be misjudged."""
    detail = "".join(traceback.format_exception(error))[-MAX_DETAIL_CHARACTERS:]
    reason = _reason(error)
    if reason is ErrorReason.OUT_OF_MEMORY:
        message = (
            "The training process ran out of memory; set or lower `training.micro_batch_size` (it keeps the batch and its negatives), lower"
            f" `training.global_batch_size`, use more processes, or a smaller model or teacher. ({_first_line(error)})"
        )
    elif isinstance(error, ValidationError):
        faults = [f"`{'.'.join(str(part) for part in fault['loc']) or 'spec'}`: {fault['msg']}" for fault in error.errors()]
        message = f"The job spec is not valid: {'; '.join(faults[:5])}"
    elif reason is ErrorReason.INTERNAL:
        message = f"{type(error).__name__}: {_first_line(error)}"
    else:
        message = str(error)
    return ErrorRecord(reason=reason, message=message, detail=detail)


def write_failure(run: Path, record: ErrorRecord) -> None:
    """Write error.json unless there is one: when one rank fails, the others fail of its absence, and the first to fail knows why."""
    path = run / ERROR_FILE
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
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

    if isinstance(error, InvalidDataError):
        return ErrorReason.INVALID_DATA
    if isinstance(error, InvalidSpecError | ValidationError):
        return ErrorReason.INVALID_SPEC
    if isinstance(error, DivergedError):
        return ErrorReason.DIVERGED
    return ErrorReason.OUT_OF_MEMORY if _is_out_of_memory(error) else ErrorReason.INTERNAL


def _is_out_of_memory(error: BaseException) -> bool:
    """torch has a class for CUDA only; its CPU allocator raises a bare RuntimeError."""
    import torch

    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(
        phrase in str(error) for phrase in ("DefaultCPUAllocator: can't allocate memory", "DefaultCPUAllocator: not enough memory")
    )


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [""])[0]
