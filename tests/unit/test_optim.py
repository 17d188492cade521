"""Parameter groups and the learning rate's curve."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import nn

from cliprd_core.models import load_student
from cliprd_core.objective import Objective
from cliprd_core.objective_spec import ObjectiveSpec
from cliprd_core.optim import build_optimizer, check_schedule, lr_at, set_learning_rate
from cliprd_core.spec import StudentSpec
from cliprd_core.training_spec import Schedule, TrainingSpec
from tests.tiny import tiny_config


def test_decay_applies_to_matrices_only() -> None:
    module = nn.ModuleDict(
        {
            "student": load_student(StudentSpec(config=tiny_config()), seed=0).model,
            "objective": Objective(ObjectiveSpec(), student_width=32, teacher_width=48, teacher_logit_scale=20.0),
        }
    )
    optimizer = build_optimizer(module, TrainingSpec(weight_decay=0.3))
    decay = {id(parameter): group["weight_decay"] for group in optimizer.param_groups for parameter in group["params"]}
    by_name = {name: decay[id(parameter)] for name, parameter in module.named_parameters()}
    assert len(by_name) == len(decay), "every parameter is in exactly one group"
    for name in ("student.logit_scale", "student.visual.ln_pre.weight", "student.visual.class_embedding", "objective.cross_scale"):
        assert by_name[name] == 0.0, name
    for name, value in by_name.items():
        if name.endswith("bias"):
            assert value == 0.0, name
    for name in ("student.text_projection", "student.token_embedding.weight", "student.visual.conv1.weight"):
        assert by_name[name] == 0.3, name
    assert by_name["objective.image_projection.weight"] == 0.3


def test_adamw_has_the_papers_settings_and_skips_frozen_parameters() -> None:
    module = nn.Linear(3, 3)
    module.bias.requires_grad_(False)
    optimizer = build_optimizer(module, TrainingSpec())
    assert [len(group["params"]) for group in optimizer.param_groups] == [1]
    group = optimizer.param_groups[0]
    assert (group["betas"], group["eps"], group["weight_decay"], group["fused"]) == ((0.9, 0.98), 1e-6, 0.1, True)
    set_learning_rate(optimizer, 0.25)
    before = module.weight.detach().clone()
    module(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    # AdamW's first update is decay, then a step of lr times the gradient's sign.
    torch.testing.assert_close(module.weight.detach(), before * (1 - 0.25 * 0.1) - 0.25, atol=1e-5, rtol=0)


def test_warm_up_then_cosine() -> None:
    training = TrainingSpec(learning_rate=0.8, warmup_steps=4)
    curve = [lr_at(step, training, 12) for step in range(12)]
    assert curve[:4] == pytest.approx([0.2, 0.4, 0.6, 0.8])
    assert curve[4] == pytest.approx(0.8)
    assert curve[8] == pytest.approx(0.4)  # half-way through the cosine
    assert curve[11] == pytest.approx(0.4 * (1 + math.cos(math.pi * 7 / 8)))
    assert all(later < earlier for earlier, later in itertools.pairwise(curve[4:]))


def test_constant_schedule_and_no_warm_up() -> None:
    training = TrainingSpec(learning_rate=0.5, warmup_steps=0, schedule=Schedule.CONSTANT)
    assert [lr_at(step, training, 3) for step in range(3)] == [0.5] * 3


def test_endless_warm_up_is_refused() -> None:
    check_schedule(TrainingSpec(warmup_steps=9), 10)
    with pytest.raises(ValueError, match=r"`training.warmup_steps` \(10\) must be less than the run's 10 steps"):
        check_schedule(TrainingSpec(warmup_steps=10), 10)
