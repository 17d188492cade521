"""Checkpoints that are damaged on a disk: the one before is used."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

from cliprd_core.run_dir import complete_checkpoints, step_of
from service.schemas import ArtifactView
from service.store.kinds import ArtifactKind
from tests.chaos.lab import FIRST_CHECKPOINT, Lab
from tests.chaos.scenario import scenario
from tests.live import eventually

Damage = Callable[[Path], None]
SECOND_CHECKPOINT = 2 * FIRST_CHECKPOINT
DAMAGED_FILE = "training.safetensors"


def truncate(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def flip_a_bit(file: Path) -> None:
    with file.open("r+b") as opened:
        opened.seek(file.stat().st_size // 2)
        (byte,) = opened.read(1)
        opened.seek(-1, os.SEEK_CUR)
        opened.write(bytes([byte ^ 1]))


def damage_in_run_directory(lab: Lab, damage: Damage) -> None:
    """Kill a job's worker once two checkpoints are there, and damage the newest, and its mirror if that was made, before the other worker
    goes on in the same folder: it goes on from the one before."""
    job_id = lab.train()
    lab.wait_for_step(job_id, SECOND_CHECKPOINT + 1)
    lab.holder(job_id).kill()
    lab.struck(job_id)
    eventually(lambda: not lab.ranks(job_id) or None)
    before, newest = complete_checkpoints(lab.run_dir(job_id))[-2:]
    mirrors = lab.client.artifacts(job_id, ArtifactKind.CHECKPOINT)
    for file in (stored_at(lab, mirror) for mirror in mirrors if (mirror.group, mirror.name) == (newest.name, DAMAGED_FILE)):
        damage(file)
    damage(newest / DAMAGED_FILE)
    lab.finish(job_id)
    assert_resumed_from(lab, job_id, step_of(before))


def damage_in_store(lab: Lab, damage: Damage) -> None:
    """The same with the mirrored copies, and a worker whose run directories are empty."""
    job_id = lab.train()

    def newest() -> list[ArtifactView] | None:
        found = lab.client.artifacts(job_id, ArtifactKind.CHECKPOINT)
        return sorted(found, key=lambda file: file.group) if len({file.group for file in found}) == 2 else None

    eventually(newest)
    lab.holder(job_id).kill()
    lab.struck(job_id)
    files = eventually(newest)
    (damaged,) = [file for file in files if file.group == files[-1].group and file.name == DAMAGED_FILE]
    damage(stored_at(lab, damaged))
    lab.finish(job_id)
    step = files[0].step
    assert step is not None
    assert_resumed_from(lab, job_id, step)


def stored_at(lab: Lab, artifact: ArtifactView) -> Path:
    """Where the artifact store keeps the bytes."""
    files = (file for file in (lab.stack.home / "artifacts").glob("*/*") if file.stat().st_size == artifact.num_bytes)
    return next(file for file in files if hashlib.sha256(file.read_bytes()).hexdigest() == artifact.sha256)


def assert_resumed_from(lab: Lab, job_id: str, step: int) -> None:
    first = next(record.step for record in lab.records(job_id) if record.attempt == 2)
    assert first == step + 1, f"attempt 2 began with step {first}, not after the checkpoint of step {step}, the newest that is intact"


@scenario("checkpoint-truncated", "the newest checkpoint and its mirror are cut in half after its worker was killed")
def checkpoint_truncated(lab: Lab) -> None:
    damage_in_run_directory(lab, truncate)


@scenario("checkpoint-bit-flipped", "a bit of the newest checkpoint and of its mirror flips after its worker was killed")
def checkpoint_bit_flipped(lab: Lab) -> None:
    damage_in_run_directory(lab, flip_a_bit)


@scenario("mirrored-checkpoint-truncated", "as before, in the artifact store; the other worker has no run directory", are_apart=True)
def mirrored_checkpoint_truncated(lab: Lab) -> None:
    damage_in_store(lab, truncate)


@scenario("mirrored-checkpoint-bit-flipped", "as before, a bit", are_apart=True)
def mirrored_checkpoint_bit_flipped(lab: Lab) -> None:
    damage_in_store(lab, flip_a_bit)
