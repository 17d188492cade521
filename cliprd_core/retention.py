"""Which checkpoints of a run are kept: the newest ones, some at equal distances, and the best by an evaluation.

Pydantic only: the spec has a part of it, and the worker asks it too. Resuming needs the newest alone, and that is always kept. What is kept
depends on steps and evaluations, never on the time or on what happened to be on the disk.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from pydantic import Field, StrictInt

from cliprd_core.run_dir import BEST_FILE, EVALUATIONS_FILE, EvaluationRecord, Record, read_records, write_atomically
from cliprd_core.spec_model import SpecModel

ZERO_SHOT_METRICS = ("zero_shot_top1", "zero_shot_top5", "zero_shot_mean_per_class_recall")
RETRIEVAL_METRICS = tuple(f"{direction}_R@{k}" for direction in ("image_to_text", "text_to_image") for k in (1, 5, 10))
"""All are better when they are higher."""


class CheckpointsToKeep(SpecModel):
    """Checkpoints that a run keeps; all others are removed as newer ones come."""

    newest: StrictInt = Field(
        default=2, ge=1, le=10_000, description="The newest so many. Two: should one be damaged, the one before is still there."
    )
    every_steps: StrictInt | None = Field(
        default=None,
        ge=1,
        description="Also those at every multiple of so many steps, in the run directory. A multiple of `checkpoint_every_steps`.",
    )
    best: str | None = Field(
        default=None,
        max_length=256,
        description="Also the one that an evaluation found best, as `DATASET/METRIC` (the highest; the first of equals). It is kept"
        " in the artifact store too, as artifacts of kind `best_checkpoint`.",
        examples=["emoji_twemoji/zero_shot_top1"],
    )


class BestCheckpoint(Record):
    """The best checkpoint so far; content of BEST_FILE."""

    step: int
    value: float = Field(description="Of the metric that decides.")


class BestSoFar:
    """Follows a run's evaluations; `checkpoint` is the best of them, None without any or where nobody asks."""

    def __init__(self, metric: str | None, checkpoint: BestCheckpoint | None = None) -> None:
        """`metric`: as `CheckpointsToKeep.best`; `checkpoint`: the best before."""
        self._dataset, _, self._metric = (metric or "").rpartition("/")
        self.checkpoint = checkpoint

    @classmethod
    def at_start(cls, run: Path, metric: str | None, checkpoint: BestCheckpoint | None, start_step: int) -> BestSoFar:
        """What is known as a run goes on from `start_step`, with what its checkpoint says; later evaluations will come again."""
        best = cls(metric, checkpoint)
        records = (record for record, _ in read_records(run / EVALUATIONS_FILE, EvaluationRecord))
        best.observe(sorted((record for record in records if record.step <= start_step), key=lambda record: record.step))
        return best

    def observe(self, records: Iterable[EvaluationRecord]) -> bool:
        """Take evaluations in the order of their steps. True: there is a new best."""
        before = self.checkpoint
        for record in records:
            value = record.metrics.get(self._metric) if record.dataset == self._dataset else None
            if value is not None and (self.checkpoint is None or value > self.checkpoint.value):
                self.checkpoint = BestCheckpoint(step=record.step, value=value)
        return self.checkpoint != before

    def write(self, run: Path) -> None:
        """Make BEST_FILE say which it is; without any there is no such file, whatever an earlier attempt said."""
        if self.checkpoint is None:
            (run / BEST_FILE).unlink(missing_ok=True)
        else:
            write_atomically(run / BEST_FILE, self.checkpoint.model_dump_json(indent=1))


def steps_to_keep(steps: Iterable[int], keep: CheckpointsToKeep, best: BestCheckpoint | None) -> set[int]:
    """Of the checkpoints at these steps, those to keep."""
    ordered = sorted(steps)
    kept = set(ordered[-keep.newest :])
    if keep.every_steps is not None:
        kept |= {step for step in ordered if step % keep.every_steps == 0}
    return kept | ({best.step} if best is not None and best.step in ordered else set())
