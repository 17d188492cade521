"""Small training runs as tests start them: here, or as processes of their own that can be killed."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from cliprd_core import train
from cliprd_core.run_dir import EXPORT_DIR, METRICS_FILE, SPEC_FILE, MetricsRecord, read_records
from cliprd_core.spec import JobSpec
from tests.held_trainer import held_by_this
from tests.ports import free_port
from tests.tiny import tiny_config, tiny_spec, write_shards, write_teacher

ROOT = Path(__file__).parents[1]
WEIGHTS = f"{EXPORT_DIR}/open_clip_model.safetensors"
NUM_STEPS = 8
TIMEOUT_SECONDS = 120


@dataclass(frozen=True)
class Inputs:
    shards: str
    teacher: str

    def spec(self, **changes: Any) -> JobSpec:
        """CLIP-RD, 2 epochs of 4 steps, from a teacher that shares neither width, resolution, context length nor tokenizer."""
        return tiny_spec(self.shards, teacher=self.teacher, **changes)

    def random_spec(self) -> JobSpec:
        """As `spec`, but with patch dropout, so that every step draws random numbers, and loader processes."""
        config = tiny_config()
        config["vision_cfg"]["patch_dropout"] = 0.3
        return self.spec(student={"config": config}, training={"num_data_workers": 1, "epochs": 3}, data={"validation": [self.source]})

    @property
    def source(self) -> dict[str, str]:
        return {"type": "webdataset", "shards": self.shards}


def make_inputs(folder: Path) -> Inputs:
    """Shards of 32 pairs, and a teacher."""
    config = tiny_config(width=48, embed_dim=48, image_size=48, context_length=20)
    config["text_cfg"]["tokenizer_kwargs"] = {"clean": "canonicalize"}
    preprocess = {"mean": [0.5, 0.5, 0.5], "std": [0.3, 0.3, 0.3], "interpolation": "bilinear"}
    return Inputs(write_shards(folder / "shards", 32, num_shards=2), write_teacher(folder / "teacher", config, preprocess=preprocess))


def run_here(run: Path, spec: JobSpec) -> int:
    """In this process, whose number of threads is that of `start`'s."""
    run.mkdir(exist_ok=True)
    (run / SPEC_FILE).write_text(spec.model_dump_json())
    return train.main([str(run / SPEC_FILE)])


def start(run: Path, spec: JobSpec, *, num_processes: int = 1, attempt: int = 1, held_step: int | None = None) -> subprocess.Popen[bytes]:
    """As processes of their own. A run that is to be killed or stopped does not begin `held_step` before that."""
    run.mkdir(exist_ok=True)
    (run / SPEC_FILE).write_text(spec.model_dump_json())
    launcher = [sys.executable]
    if num_processes > 1:
        launcher = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={num_processes}", f"--master-port={free_port()}"]
    trainer = "cliprd_core.train" if held_step is None else "tests.held_trainer"
    held = {} if held_step is None else held_by_this(held_step)
    with (run / "log.txt").open("ab") as log:
        return subprocess.Popen(
            [*launcher, "-m", trainer, str(run / SPEC_FILE)],
            cwd=ROOT,
            env={**os.environ, "CLIPRD_ATTEMPT": str(attempt), **held},
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def wait_for_step(
    run: Path, step: int, process: subprocess.Popen[bytes], *, attempt: int = 1, timeout_seconds: float = TIMEOUT_SECONDS
) -> None:
    """Return as soon as `attempt` has recorded `step`, so within a few milliseconds of the update."""
    deadline = time.monotonic() + timeout_seconds
    while True:
        has_ended = process.poll() is not None  # asked first: one that ends in between has recorded it all the same
        if any(record.step >= step and record.attempt == attempt for record in metrics(run)):
            return
        assert not has_ended, (run / "log.txt").read_text()
        assert time.monotonic() < deadline, (run / "log.txt").read_text()
        time.sleep(0.005)


def metrics(run: Path) -> list[MetricsRecord]:
    return [record for record, _ in read_records(run / METRICS_FILE, MetricsRecord)]


def losses(run: Path) -> dict[int, float]:
    """Loss by step; a step that was repeated after a crash counts as its last attempt had it."""
    return {record.step: record.values["train/loss"] for record in metrics(run) if "train/loss" in record.values}


def assert_same_weights(run: Path, other: Path) -> None:
    first, second = load_file(run / WEIGHTS), load_file(other / WEIGHTS)
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []
