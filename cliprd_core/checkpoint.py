"""Checkpoints: everything an exact resume needs, written so that a crash at any moment leaves the one before intact.

A checkpoint is a folder of safetensors and JSON; nothing in it is ever unpickled.

    student.safetensors    the student's state, under open_clip's own names
    training.safetensors   the objective's learned scales and projections (`objective/…`), the optimiser's (`optimizer/PARAMETER/…`)
    state.json             TrainingState: counters, gradient scaler, the spec it belongs to
    COMPLETE.json          CheckpointMarker with the hash of each file, written last

There is no random-generator state, because no generator carries any from one step to the next: order and crops are functions of
(seed, epoch, sample), and the trainer seeds torch from (seed, step, rank) at each step. So a run may also resume with another
number of processes. Rank 0 alone writes; every rank reads.
"""

from __future__ import annotations

import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from cliprd_core.checkpoint_files import latest_whole
from cliprd_core.hashes import file_sha256
from cliprd_core.retention import BestCheckpoint, CheckpointsToKeep, steps_to_keep
from cliprd_core.run_dir import (
    CHECKPOINT_MARKER,
    CHECKPOINTS_DIR,
    MIRRORING_PREFIX,
    CheckpointFile,
    CheckpointMarker,
    Record,
    checkpoint_dir,
    complete_checkpoints,
    step_of,
    sync_directory,
    write_atomically,
)
from cliprd_core.spec import JobSpec

STUDENT_FILE = "student.safetensors"
TRAINING_FILE = "training.safetensors"
STATE_FILE = "state.json"
OPERATIONAL_FIELDS = frozenset(
    {"training.checkpoint_every_steps", "training.keep_checkpoints", "training.log_every_steps", "training.num_data_workers"}
)
"""Fields that may change between attempts without changing what is learned."""
COMPARED_SECTIONS = ("student", "data.train", "data.crop_scale", "data.teacher_views", "objective", "training")
"""Parts of the spec that a checkpoint belongs to. The teacher is compared by its weights: its folder may differ between machines."""


class TrainingState(Record):
    """Content of state.json."""

    step: int = Field(description="Optimiser updates done; with num_steps_per_epoch it is also the sampler's position.")
    num_steps: int
    num_steps_per_epoch: int
    samples_seen: int
    attempt: int = Field(description="The attempt that saved it.")
    world_size: int = Field(description="Processes of that attempt; for information.")
    teacher_sha256: list[str | None] = Field(description="Of each teacher's weights.")
    best: BestCheckpoint | None = Field(default=None, description="The best checkpoint evaluated before this one was saved.")
    scaler: dict[str, float] = Field(description="torch's GradScaler state; empty unless fp16.")
    spec: dict[str, Any] = Field(description="The JobSpec, as JSON.")


@dataclass(frozen=True)
class TrainedParts:
    """The live objects whose state a checkpoint holds."""

    student: nn.Module
    objective: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler

    def parameter_names(self) -> dict[Tensor, str]:
        """Each parameter's name, `student.…` or `objective.…`."""
        modules = {"student": self.student, "objective": self.objective}
        return {parameter: f"{part}.{name}" for part, module in modules.items() for name, parameter in module.named_parameters()}


def save_checkpoint(run: Path, state: TrainingState, parts: TrainedParts, keep: CheckpointsToKeep) -> Path:
    """Write the checkpoint of `state.step` and remove those that are not to be kept; returns its folder.

    The files are synced under a temporary name and renamed before the marker appears, so a marker implies whole files.
    """
    final = checkpoint_dir(run, state.step)
    temporary = final.with_name(f".{final.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    _save_tensors(parts.student.state_dict(), temporary / STUDENT_FILE)
    _save_tensors(_training_tensors(parts), temporary / TRAINING_FILE)
    write_atomically(temporary / STATE_FILE, state.model_dump_json(indent=1))
    written = [_describe(temporary / name) for name in (STUDENT_FILE, TRAINING_FILE, STATE_FILE)]
    if final.exists():  # damaged, or left without a marker by a crash
        shutil.rmtree(final)
    temporary.rename(final)
    sync_directory(final.parent)
    marker = CheckpointMarker(step=state.step, time=time.time(), files=written)
    write_atomically(final / CHECKPOINT_MARKER, marker.model_dump_json(indent=1))
    prune_checkpoints(run, keep, state.best, also=final)
    return final


def latest_valid(run: Path) -> Path | None:
    """Folder of the newest checkpoint that can be resumed from. Damaged newer ones are disowned, with a warning."""
    return latest_whole(run, {STUDENT_FILE, TRAINING_FILE, STATE_FILE})


def marker_digest(folder: Path) -> str | None:
    """SHA-256 of a checkpoint's marker, which holds the hashes of all its files; None where there is no such checkpoint."""
    marker = folder / CHECKPOINT_MARKER
    return file_sha256(marker) if marker.is_file() else None


def read_state(folder: Path) -> TrainingState:
    """The counters of a checkpoint."""
    return TrainingState.model_validate_json((folder / STATE_FILE).read_bytes())


def load_checkpoint(folder: Path, parts: TrainedParts) -> None:
    """Put a checkpoint's tensors into `parts`; call `check_compatible` on its state first."""
    parts.student.load_state_dict(_read_tensors(folder / STUDENT_FILE))
    tensors = _read_tensors(folder / TRAINING_FILE)
    objective = {key.removeprefix("objective/"): value for key, value in tensors.items() if key.startswith("objective/")}
    parts.objective.load_state_dict(objective)
    _load_optimizer(tensors, parts)
    scaler = read_state(folder).scaler
    if scaler and parts.scaler.is_enabled():
        parts.scaler.load_state_dict(
            {**scaler, "growth_interval": int(scaler["growth_interval"]), "_growth_tracker": int(scaler["_growth_tracker"])}
        )


def check_compatible(saved: TrainingState, current: TrainingState) -> None:
    """Refuse to continue a run under a spec that would have trained differently from the start.

    Raises:
        ValueError: naming the fields that differ.
    """
    before, now = _flatten_compared(saved.spec), _flatten_compared(current.spec)
    before["pairs / steps of the run"], now["pairs / steps of the run"] = saved.num_steps, current.num_steps
    before["the teachers' weights (SHA-256)"], now["the teachers' weights (SHA-256)"] = saved.teacher_sha256, current.teacher_sha256
    different = [key for key in sorted(before.keys() | now.keys()) if before.get(key) != now.get(key)]
    if different:
        changes = ", ".join(f"`{key}` ({before.get(key)!r} then, {now.get(key)!r} now)" for key in different)
        raise ValueError(
            f"the checkpoint at step {saved.step} was made under another spec: {changes}; restore the spec, or use a new run directory"
        )


def spec_as_json(spec: JobSpec) -> dict[str, Any]:
    """The spec as state.json holds it."""
    return spec.model_dump(mode="json")


def _training_tensors(parts: TrainedParts) -> dict[str, Tensor]:
    tensors = {f"objective/{name}": value for name, value in parts.objective.state_dict().items()}
    names = parts.parameter_names()
    for parameter, values in parts.optimizer.state.items():
        tensors |= {f"optimizer/{names[parameter]}/{key}": value for key, value in values.items()}
    return tensors


def _load_optimizer(tensors: dict[str, Tensor], parts: TrainedParts) -> None:
    """Give each parameter its moments. A parameter without any (never updated) stays so."""
    saved: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        if key.startswith("optimizer/"):
            name, _, field = key.removeprefix("optimizer/").rpartition("/")
            saved.setdefault(name, {})[field] = value
    names = parts.parameter_names()
    ordered = [names[parameter] for group in parts.optimizer.param_groups for parameter in group["params"]]
    unknown = saved.keys() - set(ordered)
    assert not unknown, f"optimiser state of unknown parameters {sorted(unknown)}"
    content = parts.optimizer.state_dict()
    content["state"] = {index: saved[name] for index, name in enumerate(ordered) if name in saved}
    parts.optimizer.load_state_dict(content)


def _save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    save_file({name: value.detach().cpu().contiguous() for name, value in tensors.items()}, path)
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def _read_tensors(path: Path) -> dict[str, Tensor]:
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a dict)


def _describe(path: Path) -> CheckpointFile:
    return CheckpointFile(name=path.name, num_bytes=path.stat().st_size, sha256=file_sha256(path))


def prune_checkpoints(run: Path, keep: CheckpointsToKeep, best: BestCheckpoint | None, *, also: Path | None = None) -> None:
    """Remove all complete checkpoints but those to keep, and what crashes left behind. `also` is never removed, nor is what a supervisor
    uploads: that is the supervisor's to remove."""
    steps = {step_of(folder): folder for folder in complete_checkpoints(run)}
    kept = {also, *(steps[step] for step in steps_to_keep(steps, keep, best))}
    for folder in (run / CHECKPOINTS_DIR).iterdir():
        if folder.is_dir() and folder not in kept and not folder.name.startswith(MIRRORING_PREFIX):
            # the marker goes first, so that a crash half-way does not leave a checkpoint that claims to be whole
            (folder / CHECKPOINT_MARKER).unlink(missing_ok=True)
            shutil.rmtree(folder)


def _flatten_compared(spec: dict[str, Any]) -> dict[str, Any]:
    """Dotted name -> value of the fields that decide what is learned."""
    flat: dict[str, Any] = {}

    def visit(prefix: str, value: Any) -> None:
        if prefix in OPERATIONAL_FIELDS:
            return
        if isinstance(value, dict):
            for key, inner in value.items():
                visit(f"{prefix}.{key}", inner)
        else:
            flat[prefix] = value

    for section in COMPARED_SECTIONS:
        part: Any = spec
        for key in section.split("."):
            part = part[key]
        visit(section, part)
    return flat
