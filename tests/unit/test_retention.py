"""Which checkpoints are kept."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from cliprd_core.evaluation import retrieval, zero_shot
from cliprd_core.retention import RETRIEVAL_METRICS, ZERO_SHOT_METRICS, BestCheckpoint, BestSoFar, CheckpointsToKeep, steps_to_keep
from cliprd_core.run_dir import EVALUATIONS_FILE, append_record
from cliprd_core.spec import JobSpec, merge_over
from tests.store_helpers import evaluated, spec_dict

STEPS = [10, 20, 25, 30, 40, 50]
TOP1 = "emoji/zero_shot_top1"


@pytest.mark.parametrize(
    ("keep", "best", "kept"),
    [
        ({}, None, {40, 50}),
        ({"newest": 1}, None, {50}),
        ({"newest": 100}, None, set(STEPS)),
        ({"newest": 1, "every_steps": 20}, None, {20, 40, 50}),
        ({"newest": 1, "best": TOP1}, 25, {25, 50}),
        ({"newest": 1, "best": TOP1}, 45, {50}),
        ({"newest": 2, "every_steps": 10, "best": TOP1}, 25, set(STEPS)),
    ],
)
def test_steps_to_keep(keep: dict[str, Any], best: int | None, kept: set[int]) -> None:
    checkpoint = None if best is None else BestCheckpoint(step=best, value=0.5)
    for seed in range(3):
        assert steps_to_keep(random.Random(seed).sample(STEPS, len(STEPS)), CheckpointsToKeep(**keep), checkpoint) == kept
    assert steps_to_keep([], CheckpointsToKeep(**keep), checkpoint) == set()


def test_the_best_is_the_highest_and_the_first_of_equals() -> None:
    best = BestSoFar(TOP1)
    assert best.observe([evaluated(10, top1=0.4)])
    assert not best.observe([evaluated(20, top1=0.4)])
    assert best.observe([evaluated(30, top1=0.6)])
    other_set = evaluated(40).model_copy(update={"dataset": "other", "metrics": {"zero_shot_top1": 0.9}})
    other_metric = evaluated(40).model_copy(update={"metrics": {"zero_shot_top5": 0.9}})
    assert not best.observe([other_set, other_metric])
    assert best.checkpoint == BestCheckpoint(step=30, value=0.6)
    nobody_asks = BestSoFar(None)
    assert not nobody_asks.observe([evaluated(10)])
    assert nobody_asks.checkpoint is None


def test_a_resumed_run_knows_what_was_best_before_its_start(tmp_path: Path) -> None:
    before = BestCheckpoint(step=10, value=0.5)
    assert BestSoFar.at_start(tmp_path, TOP1, before, 20).checkpoint == before, "on another machine its checkpoint alone tells"
    for step, top1 in ((10, 0.5), (20, 0.7), (30, 0.9)):
        append_record(tmp_path / EVALUATIONS_FILE, evaluated(step, top1=top1))
    assert BestSoFar.at_start(tmp_path, TOP1, before, 20).checkpoint == BestCheckpoint(step=20, value=0.7), "step 30 will come again"
    assert BestSoFar.at_start(tmp_path, None, None, 20).checkpoint is None


def test_the_metrics_are_those_of_the_evaluation() -> None:
    assert [f"zero_shot_top{k}" for k in zero_shot.KS] == list(ZERO_SHOT_METRICS[:2])
    assert set(RETRIEVAL_METRICS) == {f"{one}_R@{k}" for one in ("image_to_text", "text_to_image") for k in retrieval.KS}


def spec_keeping(**changes: Any) -> JobSpec:
    evaluation = {"zero_shot": ["sets/emoji"], "retrieval": ["sets/coco"]}
    return JobSpec.model_validate(merge_over(spec_dict(evaluation=evaluation), changes))


@pytest.mark.parametrize("best", [TOP1, "coco/image_to_text_R@5"])
def test_a_metric_that_the_job_measures(best: str) -> None:
    assert spec_keeping(training={"keep_checkpoints": {"best": best}}).training.keep_checkpoints.best == best


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"training": {"keep_checkpoints": {"best": "zero_shot_top1"}}}, "such as emoji/zero_shot_top1"),
        ({"training": {"keep_checkpoints": {"best": "coco/zero_shot_top1"}}}, "doesn't measure"),
        ({"training": {"keep_checkpoints": {"best": "validation/image_to_text_R@1"}}}, "doesn't measure"),
        ({"training": {"keep_checkpoints": {"best": TOP1}}, "evaluation": {"zero_shot": [], "retrieval": []}}, "there is none"),
        ({"training": {"keep_checkpoints": {"every_steps": 1500}}}, "multiple of `checkpoint_every_steps` (1000)"),
        ({"training": {"keep_checkpoints": {"newest": 0}}}, "greater than or equal to 1"),
    ],
)
def test_what_cannot_be_kept_is_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError) as raised:
        spec_keeping(**changes)
    assert words in str(raised.value)
