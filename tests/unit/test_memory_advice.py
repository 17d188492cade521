"""The micro batch that is suggested after a GPU ran out of memory."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from cliprd_core.memory_advice import memory_advice
from cliprd_core.memory_estimate import estimate_memory
from cliprd_core.model_size import size_of_known_model
from cliprd_core.spec import JobSpec, merge_over
from tests.store_helpers import spec_dict
from tests.tiny import tiny_config

STUDENT = "ViT-B-32"


def spec_with(**changes: Any) -> JobSpec:
    spec = spec_dict(student={"model": STUDENT}, training={"global_batch_size": 1000, "warmup_steps": 1})
    return JobSpec.model_validate(merge_over(spec, changes))


def needed(micro_batch_size: int) -> int:
    spec = spec_with(training={"micro_batch_size": micro_batch_size})
    return estimate_memory(spec, size_of_known_model(STUDENT), []).total


def suggested(spec: JobSpec, device_bytes: int | None) -> int:
    found = re.search(r"`training.micro_batch_size` to (\d+) ", memory_advice(spec, device_bytes))
    assert found is not None
    return int(found[1])


@pytest.mark.parametrize("fitting", [2, 8, 128, 512])
def test_the_largest_power_of_two_that_fits(fitting: int) -> None:
    assert suggested(spec_with(), needed(fitting)) == fitting
    assert suggested(spec_with(), needed(fitting) - 1) == fitting // 2


def test_following_the_advice_again_and_again_halves_whatever_the_estimate_says() -> None:
    tried = [1000]
    while tried[-1] > 1:
        tried.append(suggested(spec_with(training={"micro_batch_size": tried[-1]}), 2**60))
    assert tried == [1000, 512, 256, 128, 64, 32, 16, 8, 4, 2, 1]
    assert memory_advice(spec_with(training={"micro_batch_size": 1}), 2**60).startswith("Lower `training.global_batch_size`")


def test_where_none_fits_that_is_said() -> None:
    assert memory_advice(spec_with(), needed(1) - 1).startswith("By estimate no `training.micro_batch_size` is small enough: lower")


def test_without_an_estimate_it_is_half(tmp_path: Path) -> None:
    assert suggested(spec_with(), None) == 500
    unknown = {"model": None, "config": {**tiny_config(), "text_cfg": {"hf_model_name": "roberta-base"}}}
    assert suggested(spec_with(student=unknown), 2**60) == 500
    teacher = {"recipe": "clip_kd", "teacher": {"model": f"local-dir:{tmp_path}"}, "objective": {"fd": 1}}
    assert suggested(spec_with(**teacher), 2**60) == 500, "a folder that is gone"
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": tiny_config()}))
    assert suggested(spec_with(**teacher), 2**60) == 512
