"""Speeds, remaining time and records."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace

import pytest

from cliprd_core.metrics_log import Lap, MetricsLog, Stopwatch
from cliprd_core.run_dir import EVALUATIONS_FILE, METRICS_FILE, EvaluationRecord, MetricsRecord, read_records

VALUES = {"train/loss": 2.0, "train/learning_rate": 1e-3}


def make_log(run: Path, start_step: int = 0) -> MetricsLog:
    return MetricsLog(run, attempt=2, num_steps=100, num_steps_per_epoch=20, global_batch_size=8, start_step=start_step, device="cpu")


def records(run: Path) -> list[MetricsRecord]:
    return [record for record, _ in read_records(run / METRICS_FILE, MetricsRecord)]


def test_speed_and_remaining_time(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    log = make_log(tmp_path, start_step=30)
    with caplog.at_level(logging.INFO, "cliprd_core"):
        log.training(31, VALUES, Lap(seconds=10.0, data_wait_share=0.5))
        log.training(40, VALUES, Lap(seconds=2.0, data_wait_share=0.25))
    first, second = records(tmp_path)
    assert (first.attempt, first.step, first.progress.samples_seen, first.progress.eta_seconds) == (2, 31, 248, None)
    assert first.progress.samples_per_second == pytest.approx(0.8)
    assert second.progress.samples_per_second == pytest.approx(9 * 8 / 2)
    assert second.progress.eta_seconds == pytest.approx(60 * 8 / 36)
    assert (second.progress.epoch, second.progress.device) == (2.0, "cpu")
    assert second.values["train/data_wait_share"] == 0.25
    assert "step 40/100  loss 2.0000" in caplog.text
    assert "0:00:13 left" in caplog.text


def test_stopwatch_leaves_out_pauses_and_counts_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0

    def pass_time(seconds: float) -> None:
        nonlocal now
        now += seconds

    monkeypatch.setattr("cliprd_core.metrics_log.time", SimpleNamespace(perf_counter=lambda: now))
    stopwatch = Stopwatch()

    def slow_items() -> list[int]:
        items = iter([1, 2])

        def produce() -> int:
            pass_time(0.05)
            return next(items)

        return list(stopwatch.waiting_for(iter(produce, 2)))

    with stopwatch.paused():
        pass_time(0.3)
    assert slow_items() == [1]
    lap = stopwatch.lap()
    assert lap.seconds == pytest.approx(0.1)
    assert lap.data_wait_share == pytest.approx(0.5)
    assert stopwatch.lap().data_wait_share == 0.0


def test_evaluations_are_recorded_in_both_files(tmp_path: Path) -> None:
    log = make_log(tmp_path)
    record = EvaluationRecord(
        attempt=2,
        step=20,
        epoch=1.0,
        time=0.0,
        task="zero_shot",
        dataset="emoji",
        num_samples=5,
        metrics={"top1": 0.5},
        chance={"top1": 0.1},
    )
    sets = {("zero_shot", "emoji")}
    assert not log.has_evaluations(20, sets)
    log.evaluation([record], 20)
    assert log.has_evaluations(20, sets)
    assert not log.has_evaluations(20, {*sets, ("retrieval", "emoji")}), "one of two sets is no whole evaluation"
    assert not log.has_evaluations(40, sets)
    assert [one for one, _ in read_records(tmp_path / EVALUATIONS_FILE, EvaluationRecord)] == [record]
    assert records(tmp_path)[0].values == {"evaluation/emoji/top1": 0.5}


def test_nothing_to_evaluate_writes_nothing(tmp_path: Path) -> None:
    make_log(tmp_path).evaluation([], 20)
    assert list(tmp_path.iterdir()) == []
