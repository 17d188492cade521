"""The files of one run: their names, the records in them, and how they are written so that a crash never leaves half a file.

This module is one of the project's three contracts: the trainer writes a run directory, the worker's supervisor reads it, and
neither knows more of the other. It imports pydantic only.

    spec.json           the resolved JobSpec; what `python -m cliprd_core.train` is given
    metrics.jsonl       one MetricsRecord per line, appended
    evaluations.jsonl   one EvaluationRecord per line, appended
    log.txt             what the training processes print (written by the supervisor)
    log.txt.pumped      bytes of it that the service has (written by the supervisor)
    best_checkpoint.json  which of the checkpoints an evaluation found best (`retention.BestCheckpoint`), if the spec asks for it
    checkpoints/        step-0000000100/ …: all state of the run at that step; complete once it holds COMPLETE.json
                        .mirroring-…: links to one that the supervisor uploads, which the trainer leaves alone
    export/             the trained student, loadable with open_clip's `local-dir:`
    result.json         ResultRecord: the run ended well
    error.json          ErrorRecord: the run ended badly, and why
"""

from __future__ import annotations

import errno
import os
import secrets
from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path
from typing import Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field

SPEC_FILE = "spec.json"
METRICS_FILE = "metrics.jsonl"
EVALUATIONS_FILE = "evaluations.jsonl"
LOG_FILE = "log.txt"
RESULT_FILE = "result.json"
ERROR_FILE = "error.json"
BEST_FILE = "best_checkpoint.json"
CHECKPOINTS_DIR = "checkpoints"
CHECKPOINT_MARKER = "COMPLETE.json"
MIRRORING_PREFIX = ".mirroring-"
EXPORT_DIR = "export"

ATTEMPT_VARIABLE = "CLIPRD_ATTEMPT"
"""Environment variable that tells the trainer which attempt it is; unset means 1."""

TEACHER_STORE_VARIABLE = "CLIPRD_TEACHER_STORE_ROOT"
"""Environment variable that tells the trainer the root folder of the teacher stores, the worker's setting of that name; unset: none."""
CACHE_DIR_VARIABLE = "CLIPRD_CACHE_DIR"
"""Environment variable: folder for what is remembered of data between runs and jobs (shard indexes, copies of remote shards)."""

SHARD_CACHE_BYTES_VARIABLE = "CLIPRD_SHARD_CACHE_BYTES"
"""Environment variable: the most bytes that copies of remote shards may take there."""

DEFAULT_SHARD_CACHE_BYTES = 100 * 10**9

DISK_FULL_ERRNOS = (errno.ENOSPC, errno.EDQUOT)
"""What the system says of a full disk, or of a used-up quota."""

EXIT_CODE_STOPPED = 75
"""The trainer's exit code after SIGTERM: it saved a checkpoint and can be resumed (EX_TEMPFAIL of sysexits.h)."""


class Record(BaseModel):
    """Base of all records: frozen; unknown fields are ignored, so that an older reader survives a newer writer."""

    model_config = ConfigDict(frozen=True, extra="ignore")


class ErrorReason(StrEnum):
    """Why a run failed; part of the API (`error.reason`)."""

    INVALID_SPEC = "invalid_spec"
    """The spec asks for what cannot be: unknown model, weights that do not fit, too few pairs for one batch."""
    INVALID_DATA = "invalid_data"
    """The data could not be read: shards missing, no readable pair."""
    OUT_OF_MEMORY = "out_of_memory"
    DIVERGED = "diverged"
    """The loss or the gradient became NaN or infinite."""
    WORKER_LOST = "worker_lost"
    """The worker, one of its training processes, or a machine of the run was killed or vanished, too often."""
    TEACHER_UNAVAILABLE = "teacher_unavailable"
    """The job or artifact that should be the teacher failed, was cancelled or is gone."""
    DISK_FULL = "disk_full"
    """A disk of the worker, or the artifact store, is full."""
    TIMEOUT = "timeout"
    """It ran for `resources.max_hours` without coming to its end."""
    INTERNAL = "internal"
    """A fault of cliprd itself."""


class Progress(Record):
    """How far a run is."""

    step: int = Field(description="Optimiser updates done.")
    num_steps: int = Field(description="Optimiser updates of the whole run.")
    epoch: float = Field(description="Passes over the training pairs done, with fraction.")
    samples_seen: int = Field(description="Pairs trained on, over all processes and epochs.")
    samples_per_second: float = Field(description="Pairs a second over all processes, since the last record.")
    eta_seconds: float | None = Field(description="Seconds left at this speed, without evaluation. Null until known.")
    device: str | None = Field(default=None, description="What it is computed on: `cpu`, or the GPU's name. Null: from an older version.")


class MetricsRecord(Record):
    """What was measured at one step. `values` maps a name such as `train/loss` to a finite number."""

    attempt: int
    step: int
    time: float = Field(description="Unix seconds.")
    progress: Progress
    values: dict[str, float]


EvaluationTask = Literal["zero_shot", "retrieval", "validation"]


class EvaluationRecord(Record):
    """One data set's evaluation at one step. All values are fractions 0-1."""

    attempt: int
    step: int
    epoch: float
    time: float = Field(description="Unix seconds.")
    task: EvaluationTask
    dataset: str = Field(description="The set's `name` in the spec.")
    num_samples: int = Field(description="Images evaluated.")
    metrics: dict[str, float] = Field(description="`zero_shot_top1`, `image_to_text_R@1`, …")
    chance: dict[str, float] = Field(description="What guessing scores, under the same names.")


class ResultRecord(Record):
    """A run that ended well."""

    step: int
    samples_seen: int
    num_student_parameters: int
    num_teacher_parameters: int | None
    num_corrupt_samples: int = Field(description="Pairs that could not be read and were skipped, over the last attempt.")
    train_seconds: float = Field(description="Wall-clock seconds of this attempt, evaluation included.")
    export_files: list[str] = Field(description="Names of the files under export/.")
    export_sha256: dict[str, str] = Field(default_factory=dict, description="SHA-256 of each when it was written, by name; hexadecimal.")


class ErrorRecord(Record):
    """A run that ended badly."""

    reason: ErrorReason
    message: str = Field(description="One or two sentences: what is wrong, and often what to do.")
    advice: str = Field(default="", description="What to do about this very failure. Empty: nothing but what its reason always calls for.")
    detail: str = Field(default="", description="Traceback or other evidence.")


class CheckpointFile(Record):
    """One file of a checkpoint, for verification."""

    name: str
    num_bytes: int
    sha256: str


class CheckpointMarker(Record):
    """Content of COMPLETE.json, written last: the checkpoint is whole if its files match."""

    step: int
    time: float = Field(description="Unix seconds.")
    files: list[CheckpointFile]


AnyRecord = TypeVar("AnyRecord", bound=Record)


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write `content` so that `path` holds either the old or the new bytes, whatever happens."""
    # A random part, since process ids repeat where machines or containers share a folder.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    with temporary.open("wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    sync_directory(path.parent)


def sync_directory(path: Path) -> None:
    """Make a rename or a creation inside `path` survive power loss."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def append_record(path: Path, record: Record) -> None:
    """Append one line. A torn last line, left by a crash, is closed first so that the new record starts a line of its own."""
    line = record.model_dump_json().encode() + b"\n"
    with path.open("ab+") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                line = b"\n" + line
        file.write(line)
        file.flush()


def read_records(path: Path, kind: type[AnyRecord], offset: int = 0) -> Iterator[tuple[AnyRecord, int]]:
    """Yield each whole record from byte `offset` on, with the offset after it. A torn line is skipped; a missing file is empty.

    A last line without its newline is left for the next call, since it may still be growing.
    """
    if not path.exists():
        return
    with path.open("rb") as file:
        file.seek(offset)
        for line in file:
            if not line.endswith(b"\n"):
                return
            offset += len(line)
            try:
                record = kind.model_validate_json(line)
            except ValueError:
                continue
            yield record, offset


def read_record(path: Path, kind: type[AnyRecord]) -> AnyRecord | None:
    """The single record in a file, or None where there is no such file."""
    return kind.model_validate_json(path.read_bytes()) if path.exists() else None


def cache_dir(run: Path) -> Path:
    """The shared cache folder that the environment names, else one inside the run directory."""
    shared = os.environ.get(CACHE_DIR_VARIABLE)
    return Path(shared) if shared else run / "cache"


def shard_cache_bytes() -> int:
    """What copies of remote shards may take in the cache folder.

    Raises:
        ValueError: the environment variable is no whole number above 0.
    """
    value = os.environ.get(SHARD_CACHE_BYTES_VARIABLE, str(DEFAULT_SHARD_CACHE_BYTES))
    if not value.isdecimal() or int(value) == 0:
        raise ValueError(f"{SHARD_CACHE_BYTES_VARIABLE} is {value!r}; set it to a number of bytes")
    return int(value)


def checkpoint_dir(run: Path, step: int) -> Path:
    """Folder of the checkpoint at `step`; the zero-padded name sorts by step."""
    return run / CHECKPOINTS_DIR / f"step-{step:010d}"


def complete_checkpoints(run: Path) -> list[Path]:
    """Folders of finished checkpoints, oldest first. Their files are not verified here."""
    return sorted(marker.parent for marker in (run / CHECKPOINTS_DIR).glob(f"step-*/{CHECKPOINT_MARKER}"))


def step_of(checkpoint: Path) -> int:
    """The step of a checkpoint's folder."""
    return int(checkpoint.name.removeprefix("step-"))
