"""Where and when training left the finite numbers, found without looking at every step."""

from __future__ import annotations

import math

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from cliprd_core.divergence import DivergenceWatch
from cliprd_core.failures import DivergedError, describe_failure
from cliprd_core.run_dir import ErrorReason, ErrorRecord

NAMES = ("train/loss", "train/grad_norm", "train/term/task", "train/term/fd", "train/term/vrd_kl", "train/term/vrd", "train/logit_scale")


def watch(*steps: dict[str, float], is_scaled: bool = False) -> DivergenceWatch:
    """After these steps, whose numbers are 1 but for those given."""
    watch = DivergenceWatch(is_scaled=is_scaled)
    for step, changed in enumerate(steps, start=1):
        watch.observe(NAMES, torch.tensor([changed.get(name, 1.0) for name in NAMES]), step)
    return watch


def found(watch: DivergenceWatch) -> ErrorRecord:
    with pytest.raises(DivergedError) as raised:
        watch.check()
    return describe_failure(raised.value)


ALL = dict.fromkeys(NAMES, math.nan)


def test_the_first_step_and_its_term_are_named_however_late_it_is_looked_at() -> None:
    broken = {"train/loss": math.inf, "train/grad_norm": math.nan, "train/term/fd": math.inf, "train/logit_scale": math.nan}
    record = found(watch({}, {}, broken, ALL, ALL))
    assert record.reason is ErrorReason.DIVERGED
    assert record.message == "The loss term `fd` was no longer a finite number at step 3."
    assert record.advice.startswith("It broke in the loss term `fd` at step 3: lower `training.learning_rate` or `objective.fd`,")


@pytest.mark.parametrize(
    ("broken", "culprit"),
    [
        (ALL, "The loss terms `task`, `fd`, `vrd_kl` were"),
        ({"train/loss": math.nan, "train/term/vrd_kl": math.nan, "train/term/vrd": math.nan}, "The loss term `vrd_kl` was"),
        ({"train/loss": math.inf}, "The loss was"),
        ({"train/grad_norm": math.inf, "train/logit_scale": math.nan}, "The gradient was"),
        ({"train/logit_scale": math.inf}, "The logit_scale was"),
    ],
)
def test_what_broke_is_named_by_where_it_began(broken: dict[str, float], culprit: str) -> None:
    assert found(watch({}, broken, ALL)).message.startswith(culprit)


def test_what_was_broken_once_is_never_forgotten() -> None:
    assert "at step 1" in found(watch({"train/grad_norm": math.nan}, {}, {})).message


def test_finite_numbers_raise_nothing() -> None:
    watch().check()
    watch({}, {}).check()


def test_a_gradient_scaler_skips_steps_of_infinite_gradient() -> None:
    watch({"train/grad_norm": math.inf}, is_scaled=True).check()
    watch({"train/loss": math.nan}, {}, is_scaled=True).check()
    assert "at step 3" in found(watch(ALL, {}, ALL, ALL, is_scaled=True)).message


@pytest.mark.parametrize("is_scaled", [False, True])
def test_observing_never_reads_the_device(is_scaled: bool) -> None:
    """Fake tensors hold no numbers, so anything that would bring one to the host raises."""
    with FakeTensorMode():
        seen = watch({}, ALL, {}, is_scaled=is_scaled)
        with pytest.raises(Exception, match=r"aten\._local_scalar_dense"):
            seen.check()
