"""Checkpoints: exact round trip, damage, pruning, compatibility."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import nn

from cliprd_core import checkpoint
from cliprd_core.checkpoint import (
    STATE_FILE,
    STUDENT_FILE,
    TRAINING_FILE,
    TrainedParts,
    TrainingState,
    check_compatible,
    latest_valid,
    load_checkpoint,
    prune_checkpoints,
    read_state,
    save_checkpoint,
    spec_as_json,
)
from cliprd_core.optim import build_optimizer
from cliprd_core.retention import BestCheckpoint, CheckpointsToKeep
from cliprd_core.run_dir import CHECKPOINT_MARKER, CHECKPOINTS_DIR, checkpoint_dir, complete_checkpoints, step_of
from cliprd_core.training_spec import TrainingSpec
from tests.tiny import tiny_spec


class Scales(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cross_scale = nn.Parameter(torch.tensor(2.5))
        self.projection = nn.Linear(3, 2, bias=False)


def make_parts(seed: int) -> TrainedParts:
    torch.manual_seed(seed)
    student, objective = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 3)), Scales()
    optimizer = build_optimizer(nn.ModuleList([student, objective]), TrainingSpec())
    return TrainedParts(student, objective, optimizer, torch.amp.GradScaler("cpu", enabled=False))


def take_steps(parts: TrainedParts, count: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        parts.optimizer.zero_grad()
        features = parts.student(torch.randn(8, 4, generator=generator))
        (parts.objective.projection(features).square().mean() * parts.objective.cross_scale).backward()  # type: ignore[operator]
        parts.optimizer.step()


def make_state(step: int, **changes: Any) -> TrainingState:
    state = TrainingState(
        step=step,
        num_steps=20,
        num_steps_per_epoch=10,
        samples_seen=step * 8,
        attempt=1,
        world_size=1,
        teacher_sha256=["abc"],
        scaler={},
        spec=spec_as_json(tiny_spec("x.tar")),
    )
    return state.model_copy(update=changes)


def everything(parts: TrainedParts) -> dict[str, torch.Tensor]:
    tensors = {f"student.{key}": value for key, value in parts.student.state_dict().items()}
    tensors |= {f"objective.{key}": value for key, value in parts.objective.state_dict().items()}
    for parameter, values in parts.optimizer.state.items():
        tensors |= {f"optimizer.{parts.parameter_names()[parameter]}.{key}": value for key, value in values.items()}
    return {key: value.detach().clone() for key, value in tensors.items()}


def test_resumed_training_is_bit_identical(tmp_path: Path) -> None:
    straight = make_parts(0)
    take_steps(straight, 3, seed=1)
    save_checkpoint(tmp_path, make_state(3), straight, CheckpointsToKeep())
    take_steps(straight, 4, seed=2)

    resumed = make_parts(99)
    folder = latest_valid(tmp_path)
    assert folder is not None
    assert read_state(folder) == make_state(3)
    load_checkpoint(folder, resumed)
    take_steps(resumed, 4, seed=2)

    expected, actual = everything(straight), everything(resumed)
    assert expected.keys() == actual.keys()
    assert [key for key in expected if not torch.equal(expected[key], actual[key])] == []
    assert any(key.endswith("exp_avg_sq") for key in expected)


def test_gradient_scaler_survives(tmp_path: Path) -> None:
    parts = make_parts(0)
    scaler = torch.amp.GradScaler("cpu", init_scale=512.0)
    parts = TrainedParts(parts.student, parts.objective, parts.optimizer, scaler)
    folder = save_checkpoint(tmp_path, make_state(3, scaler=scaler.state_dict()), parts, CheckpointsToKeep())
    fresh = TrainedParts(parts.student, parts.objective, parts.optimizer, torch.amp.GradScaler("cpu"))
    load_checkpoint(folder, fresh)
    assert fresh.scaler.state_dict() == scaler.state_dict()
    assert fresh.scaler.get_scale() == 512.0


def test_contents_are_safetensors_and_json_only(tmp_path: Path) -> None:
    parts = make_parts(0)
    take_steps(parts, 1, seed=1)
    folder = save_checkpoint(tmp_path, make_state(1), parts, CheckpointsToKeep())
    assert sorted(path.name for path in folder.iterdir()) == sorted([CHECKPOINT_MARKER, STATE_FILE, STUDENT_FILE, TRAINING_FILE])
    json.loads((folder / STATE_FILE).read_text())
    with safe_open(folder / STUDENT_FILE, framework="pt") as file:
        assert set(file.keys()) == set(parts.student.state_dict()), "student.safetensors holds open_clip's own names"


@pytest.mark.parametrize("name", [STUDENT_FILE, TRAINING_FILE, STATE_FILE, CHECKPOINT_MARKER])
@pytest.mark.parametrize("damage", ["truncate", "flip", "remove"])
def test_damaged_checkpoint_falls_back_to_the_one_before(tmp_path: Path, name: str, damage: str, caplog: pytest.LogCaptureFixture) -> None:
    parts = make_parts(0)
    take_steps(parts, 1, seed=1)
    older = save_checkpoint(tmp_path, make_state(1), parts, CheckpointsToKeep())
    newer = save_checkpoint(tmp_path, make_state(2), parts, CheckpointsToKeep())
    assert latest_valid(tmp_path) == newer
    path = newer / name
    content = bytearray(path.read_bytes())
    if damage == "truncate":
        path.write_bytes(content[: len(content) // 2])
    elif damage == "remove":
        path.unlink()
    else:
        content[len(content) // 2 if name != CHECKPOINT_MARKER else 0] ^= 1
        path.write_bytes(content)
    assert latest_valid(tmp_path) == older
    if not (name == CHECKPOINT_MARKER and damage == "remove"):  # without a marker it never claimed to be whole
        assert "is damaged" in caplog.text
    assert save_checkpoint(tmp_path, make_state(2), parts, CheckpointsToKeep()) == newer, "saving the step again replaces the damaged one"
    assert latest_valid(tmp_path) == newer


def test_only_the_last_two_are_kept_and_leftovers_go(tmp_path: Path) -> None:
    parts = make_parts(0)
    (tmp_path / CHECKPOINTS_DIR / ".step-0000000001.tmp").mkdir(parents=True)
    unfinished = checkpoint_dir(tmp_path, 1)
    unfinished.mkdir()
    for step in (2, 3, 4, 5):
        save_checkpoint(tmp_path, make_state(step), parts, CheckpointsToKeep())
    assert [path.name for path in sorted((tmp_path / CHECKPOINTS_DIR).iterdir())] == ["step-0000000004", "step-0000000005"]


def test_damaged_ones_take_no_place_among_those_kept(tmp_path: Path) -> None:
    parts = make_parts(0)
    for step in (1, 2, 3):
        save_checkpoint(tmp_path, make_state(step), parts, CheckpointsToKeep())
    (checkpoint_dir(tmp_path, 3) / STATE_FILE).write_text("{}")
    assert latest_valid(tmp_path) == checkpoint_dir(tmp_path, 2)
    prune_checkpoints(tmp_path, CheckpointsToKeep(newest=1), None)
    assert complete_checkpoints(tmp_path) == [checkpoint_dir(tmp_path, 2)]


def test_what_the_spec_wants_is_kept_and_the_saved_one_always(tmp_path: Path) -> None:
    parts = make_parts(0)
    keep = CheckpointsToKeep(newest=1, every_steps=4, best="validation/image_to_text_R@1")
    for step, best in ((2, None), (4, None), (6, 2), (7, 6), (8, 6), (9, 6)):
        checkpoint_before = None if best is None else BestCheckpoint(step=best, value=best / 10)
        save_checkpoint(tmp_path, make_state(step, best=checkpoint_before), parts, keep)
        assert read_state(checkpoint_dir(tmp_path, step)).best == checkpoint_before
    assert [step_of(path) for path in complete_checkpoints(tmp_path)] == [4, 6, 8, 9]
    prune_checkpoints(tmp_path, keep, BestCheckpoint(step=9, value=1.0))
    assert [step_of(path) for path in complete_checkpoints(tmp_path)] == [4, 8, 9]
    save_checkpoint(tmp_path, make_state(5), parts, keep)  # a resumed run that passed over damaged newer ones
    assert [step_of(path) for path in complete_checkpoints(tmp_path)] == [4, 5, 8, 9]


def test_crash_before_the_marker_leaves_the_older_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = make_parts(0)
    older = save_checkpoint(tmp_path, make_state(1), parts, CheckpointsToKeep())

    def crash(path: Path, content: str) -> None:
        if path.name == CHECKPOINT_MARKER:
            raise OSError("power cut")
        path.write_text(content)

    monkeypatch.setattr(checkpoint, "write_atomically", crash)
    with pytest.raises(OSError, match="power cut"):
        save_checkpoint(tmp_path, make_state(2), parts, CheckpointsToKeep())
    assert complete_checkpoints(tmp_path) == [older]
    assert latest_valid(tmp_path) == older


def test_no_checkpoint_at_all(tmp_path: Path) -> None:
    assert latest_valid(tmp_path) is None


def test_compatible_changes() -> None:
    saved = make_state(3)
    spec = copy.deepcopy(saved.spec)
    spec["name"], spec["training"]["log_every_steps"], spec["training"]["checkpoint_every_steps"] = "renamed", 7, 9
    spec["training"]["keep_checkpoints"] = {"newest": 5, "every_steps": 9, "best": None}
    spec["resources"]["num_processes"] = 4
    check_compatible(saved, make_state(0, spec=spec, world_size=4, attempt=2))


@pytest.mark.parametrize(
    ("path", "value", "named"),
    [
        (("training", "learning_rate"), 0.5, "`training.learning_rate` (0.001 then, 0.5 now)"),
        (("objective", "fd"), 1.0, "`objective.fd` (0.0 then, 1.0 now)"),
        (("student", "config", "embed_dim"), 64, "`student.config.embed_dim` (32 then, 64 now)"),
        (("data", "crop_scale"), [0.5, 1.0], "`data.crop_scale`"),
    ],
)
def test_incompatible_changes_are_named(path: tuple[str, ...], value: object, named: str) -> None:
    saved = make_state(3)
    spec = copy.deepcopy(saved.spec)
    part = spec
    for key in path[:-1]:
        part = part[key]
    part[path[-1]] = value
    with pytest.raises(ValueError, match="made under another spec") as raised:
        check_compatible(saved, make_state(0, spec=spec))
    assert named in str(raised.value)
    assert "new run directory" in str(raised.value)


def test_another_teacher_or_data_size_is_incompatible() -> None:
    with pytest.raises(ValueError, match="teachers' weights"):
        check_compatible(make_state(3), make_state(0, teacher_sha256=["other"]))
    with pytest.raises(ValueError, match="steps of the run"):
        check_compatible(make_state(3), make_state(0, num_steps=40))


def test_copied_folder_is_valid_elsewhere(tmp_path: Path) -> None:
    """A checkpoint mirrored to another machine resumes there."""
    parts = make_parts(0)
    save_checkpoint(tmp_path / "a", make_state(1), parts, CheckpointsToKeep())
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    assert latest_valid(tmp_path / "b") == checkpoint_dir(tmp_path / "b", 1)
