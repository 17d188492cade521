"""Quality against cost of `data.teacher_views`, on the emoji example: `python benchmarks/teacher_views.py`, one table.

Trains the example's teacher once, then its distilled student with each number of views, each with a store of its own, empty at first.
What is shown is the zero-shot accuracy on the drawing style that none was trained on, the mean over seeds and their range, and how many
epochs run the teacher. It takes a few minutes for each run on two cores.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from cliprd_core.run_dir import EVALUATIONS_FILE, EXPORT_DIR, TEACHER_STORE_VARIABLE, EvaluationRecord, read_records
from cliprd_core.spec import JobSpec, merge_over
from cliprd_core.stopping import StopRequest
from cliprd_core.trainer import train

REPOSITORY = Path(__file__).resolve().parents[1]
EXAMPLE = REPOSITORY / "examples" / "emoji"
CLASSIFICATION, METRIC = "emoji_twemoji", "zero_shot_top1"


def run(folder: Path, spec: dict[str, Any]) -> tuple[float, float]:
    """Train; returns the last zero-shot accuracy and the seconds it took."""
    folder.mkdir(parents=True)
    started = time.perf_counter()
    train(JobSpec.model_validate(spec), folder, StopRequest())
    records = [record for record, _ in read_records(folder / EVALUATIONS_FILE, EvaluationRecord) if record.dataset == CLASSIFICATION]
    return records[-1].metrics[METRIC], time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--views", type=int, nargs="+", default=[0, 1, 2, 4, 8], help="0: a new crop every epoch, the teacher online")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--teacher", help="an exported teacher as `local-dir:FOLDER`; default: train the example's")
    parser.add_argument("--epochs", type=int, help="of the students; default: the example's")
    parser.add_argument("--teacher-epochs", type=int, help="default: the example's")
    parser.add_argument("--crop-scale", type=float, nargs=2, default=[0.9, 1.0])
    args = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    os.chdir(REPOSITORY)  # the specs' paths start here
    home = Path(tempfile.mkdtemp(prefix="cliprd-views-"))
    try:
        teacher = args.teacher
        if teacher is None:
            spec = json.loads((EXAMPLE / "teacher.json").read_text())
            epochs = args.teacher_epochs or spec["training"]["epochs"]
            accuracy, _ = run(home / "teacher", merge_over(spec, {"training": {"epochs": epochs}, "evaluation": {"every_epochs": epochs}}))
            print(f"teacher: {accuracy:.1%}", flush=True)
            teacher = f"local-dir:{home / 'teacher' / EXPORT_DIR}"
        student = json.loads((EXAMPLE / "student_clip_rd.json").read_text()) | {"teacher": {"model": teacher}}
        epochs = args.epochs or student["training"]["epochs"]
        print(f"{epochs} epochs, crops of {args.crop_scale[0]} to {args.crop_scale[1]} of the area, seeds {args.seeds}")
        print("| views | epochs with the teacher | top-1, mean | range | seconds |\n|---|---|---|---|---|")
        for views in args.views:
            results = []
            for seed in args.seeds:
                folder = home / f"views-{views}-seed-{seed}"
                os.environ[TEACHER_STORE_VARIABLE] = str(folder / "stores")
                changes = {
                    "training": {"seed": seed, "epochs": epochs},
                    "data": {"teacher_views": views, "crop_scale": args.crop_scale},
                    "evaluation": {"every_epochs": epochs},
                }
                results.append(run(folder, merge_over(student, changes)))
            accuracies = [accuracy for accuracy, _ in results]
            spread = f"{min(accuracies):.2%} to {max(accuracies):.2%}"
            seconds = statistics.mean(seconds for _, seconds in results)
            names = f"{views or 'a new one every epoch'} | {min(views or epochs, epochs)}"
            print(f"| {names} | {statistics.mean(accuracies):.2%} | {spread} | {seconds:.0f} |", flush=True)
    finally:
        shutil.rmtree(home)


if __name__ == "__main__":
    main()
