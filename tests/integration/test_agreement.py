"""Training processes that do not see one run say so before the first step, on every rank."""

from __future__ import annotations

from pathlib import Path

import pytest

from cliprd_core import distributed
from cliprd_core.agreement import agreed_checkpoint, check_agreement, check_run_dir_is_shared
from cliprd_core.control import ControlGroup
from cliprd_core.hashes import file_sha256
from cliprd_core.run_dir import CHECKPOINT_MARKER, CheckpointFile, CheckpointMarker, checkpoint_dir
from tests.process_group import join_group, run_processes

PARTS = ("student.safetensors", "training.safetensors", "state.json")


def write_checkpoint(run: Path, step: int, content: bytes) -> Path:
    folder = checkpoint_dir(run, step)
    folder.mkdir(parents=True)
    files = []
    for name in PARTS:
        (folder / name).write_bytes(content)
        files.append(CheckpointFile(name=name, num_bytes=len(content), sha256=file_sha256(folder / name)))
    (folder / CHECKPOINT_MARKER).write_text(CheckpointMarker(step=step, time=0.0, files=files).model_dump_json())
    return folder


def check_shared_folders(rank: int, num_processes: int, port: int, root: Path) -> None:
    join_group(rank, num_processes, port)
    control = ControlGroup()
    shared, own = root / "shared", root / f"machine{rank}"
    check_run_dir_is_shared(shared, control)
    assert list(shared.glob(".shared-*")) == []
    with pytest.raises(ValueError, match=r"machine0 of rank 0 .* one shared folder"):
        check_run_dir_is_shared(own if rank < 2 else root / "machine0", control)
    distributed.shutdown()


def check_differences(rank: int, num_processes: int, port: int) -> None:
    join_group(rank, num_processes, port)
    control = ControlGroup()
    check_agreement(control, {"the spec": "a", "the training pairs": None})
    with pytest.raises(ValueError, match="do not agree on the training pairs: rank 1 on "):
        check_agreement(control, {"the spec": "a", "the training pairs": "other" if rank == 1 else "same"})
    distributed.shutdown()


def check_checkpoints(rank: int, num_processes: int, port: int, root: Path) -> None:
    join_group(rank, num_processes, port)
    control = ControlGroup()
    same, other = root / f"same{rank}", root / f"other{rank}"
    folder = write_checkpoint(same, 4, b"weights")
    write_checkpoint(other, 4, b"weights of %d" % rank)
    if rank == 1:
        write_checkpoint(same, 6, b"of another run")
    assert agreed_checkpoint(same, control) == folder
    assert agreed_checkpoint(root / "none", control) is None
    with pytest.raises(ValueError, match="do not agree on the checkpoint step-0000000004: rank 1"):
        agreed_checkpoint(other, control)
    with pytest.raises(ValueError, match="rank 1"):
        agreed_checkpoint(same if rank == 0 else root / "none", control)
    distributed.shutdown()


def test_a_run_directory_of_its_own_is_noticed_at_the_start(tmp_path: Path) -> None:
    for name in ("shared", "machine0", "machine1"):
        (tmp_path / name).mkdir()
    run_processes(check_shared_folders, 3, tmp_path)


def test_what_differs_is_named_with_its_machine() -> None:
    run_processes(check_differences, 2)


def test_ranks_that_see_different_checkpoints_do_not_start(tmp_path: Path) -> None:
    run_processes(check_checkpoints, 2, tmp_path)
