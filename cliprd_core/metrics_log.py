"""What a run says about itself: metrics.jsonl, evaluations.jsonl, and a line on standard output. Written by the main process alone."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator, Set
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from cliprd_core.run_dir import EVALUATIONS_FILE, METRICS_FILE, EvaluationRecord, MetricsRecord, Progress, append_record, read_records

logger = logging.getLogger(__name__)

Item = TypeVar("Item")


@dataclass(frozen=True)
class Lap:
    """The training between two records."""

    seconds: float  # without evaluations and checkpoints
    data_wait_share: float  # fraction of `seconds` spent waiting for the loader


class Stopwatch:
    """Measures laps of training, leaving out what is done within `paused`."""

    def __init__(self) -> None:
        self.start_lap()

    def start_lap(self) -> None:
        self._started = time.perf_counter()
        self._paused_seconds = 0.0
        self._waited_seconds = 0.0

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time spent in here is not training."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self._paused_seconds += time.perf_counter() - started

    def waiting_for(self, items: Iterator[Item]) -> Iterator[Item]:
        """The same items; the time each takes to arrive counts as waiting for data."""
        while True:
            started = time.perf_counter()
            try:
                item = next(items)
            except StopIteration:
                return
            self._waited_seconds += time.perf_counter() - started
            yield item

    def lap(self) -> Lap:
        """The lap until now; the next one starts."""
        seconds = max(time.perf_counter() - self._started - self._paused_seconds, 1e-9)
        lap = Lap(seconds=seconds, data_wait_share=min(self._waited_seconds / seconds, 1.0))
        self.start_lap()
        return lap


class MetricsLog:
    """Appends the records of one attempt."""

    def __init__(
        self, run: Path, *, attempt: int, num_steps: int, num_steps_per_epoch: int, global_batch_size: int, start_step: int, device: str
    ) -> None:
        self._run = run
        self._device = device
        self._attempt = attempt
        self._num_steps = num_steps
        self._num_steps_per_epoch = num_steps_per_epoch
        self._global_batch_size = global_batch_size
        self._last_step = start_step
        self._is_first = True
        self._samples_per_second = 0.0
        self._eta_seconds: float | None = None

    def training(self, step: int, values: dict[str, float], lap: Lap) -> None:
        """Record the training values at `step`; speed and remaining time are added from `lap`.

        The first record of an attempt has no estimate of the time left: its lap holds the warming up of everything.
        """
        self._samples_per_second = (step - self._last_step) * self._global_batch_size / lap.seconds
        if not self._is_first:
            self._eta_seconds = (self._num_steps - step) * self._global_batch_size / self._samples_per_second
        self._last_step, self._is_first = step, False
        speed = {"train/samples_per_second": self._samples_per_second, "train/data_wait_share": lap.data_wait_share}
        self._append(step, values | speed)
        logger.info(
            "step %d/%d  loss %.4f  lr %.2e  %.1f samples/s  %s left",
            step,
            self._num_steps,
            values["train/loss"],
            values["train/learning_rate"],
            self._samples_per_second,
            "?" if self._eta_seconds is None else _readable(self._eta_seconds),
        )

    def evaluation(self, records: list[EvaluationRecord], step: int) -> None:
        """Record one evaluation: its values among the metrics, then a line per data set, which say that it is whole."""
        values = {f"evaluation/{record.dataset}/{name}": value for record in records for name, value in record.metrics.items()}
        if values:
            self._append(step, values)
        for record in records:
            append_record(self._run / EVALUATIONS_FILE, record)
            shown = "  ".join(f"{name} {value:.4f}" for name, value in record.metrics.items())
            logger.info("step %d  %s %s (%d)  %s", step, record.task, record.dataset, record.num_samples, shown)

    def has_evaluations(self, step: int, sets: Set[tuple[str, str]]) -> bool:
        """Whether evaluations at `step` on all these sets (task and name) are on record, from this attempt or earlier ones."""
        records = (record for record, _ in read_records(self._run / EVALUATIONS_FILE, EvaluationRecord))
        return sets <= {(record.task, record.dataset) for record in records if record.step == step}

    def _append(self, step: int, values: dict[str, float]) -> None:
        assert all(math.isfinite(value) for value in values.values()), values
        progress = Progress(
            step=step,
            num_steps=self._num_steps,
            epoch=step / self._num_steps_per_epoch,
            samples_seen=step * self._global_batch_size,
            samples_per_second=self._samples_per_second,
            eta_seconds=self._eta_seconds,
            device=self._device,
        )
        record = MetricsRecord(attempt=self._attempt, step=step, time=time.time(), progress=progress, values=values)
        append_record(self._run / METRICS_FILE, record)


def _readable(seconds: float) -> str:
    minutes, whole_seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours:d}:{minutes:02d}:{whole_seconds:02d}"
