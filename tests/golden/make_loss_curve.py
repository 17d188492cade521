"""Writes tests/golden/loss_curve.json: every term's value at every step of one small CLIP-RD run on the CPU in fp32.

Run `python -m tests.golden.make_loss_curve` from the repository's root, and only where the numbers are meant to change: the file
is what tells an intended change of the training from an accident.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from cliprd_core.run_dir import METRICS_FILE, MetricsRecord, read_records
from cliprd_core.spec import JobSpec
from tests.tiny import tiny_config, tiny_spec, write_shards, write_teacher

GOLDEN_FILE = Path(__file__).with_name("loss_curve.json")


def golden_spec(folder: Path) -> JobSpec:
    """All terms of CLIP-RD, and a teacher that differs from the student in width, resolution and context length; it runs in every step."""
    shards = write_shards(folder / "shards", 32, num_shards=2)
    teacher = write_teacher(folder / "teacher", tiny_config(width=48, embed_dim=48, image_size=48, context_length=20))
    return tiny_spec(shards, teacher=teacher, data={"teacher_views": 0}, training={"learning_rate": 2e-4, "epochs": 3})


def loss_curve(run_dir: Path) -> list[dict[str, float]]:
    """Step by step, the values that must not change: losses, scales, learning rate, gradient norm. No speeds."""
    records = [record for record, _ in read_records(run_dir / METRICS_FILE, MetricsRecord)]
    unstable = {"train/samples_per_second", "train/data_wait_share"}
    return [
        {name: value for name, value in record.values.items() if name.startswith("train/") and name not in unstable} for record in records
    ]


def main() -> None:
    from cliprd_core.stopping import StopRequest
    from cliprd_core.trainer import train

    with tempfile.TemporaryDirectory() as folder:
        run_dir = Path(folder)
        train(golden_spec(run_dir), run_dir, StopRequest())
        rounded = [{name: float(f"{value:.9g}") for name, value in values.items()} for values in loss_curve(run_dir)]
    GOLDEN_FILE.write_text(json.dumps(rounded, indent=1) + "\n")


if __name__ == "__main__":
    main()
