"""The estimate of a training process's memory, against what torch holds."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from cliprd_core.memory_estimate import MemoryEstimate, estimate_memory, num_objective_parameters, num_trained_parameters
from cliprd_core.model_size import ModelSize, size_of_config
from cliprd_core.models import load_student
from cliprd_core.optim import build_optimizer
from cliprd_core.spec import JobSpec, merge_over
from cliprd_core.step_module import StudentWithObjective, WholeBatch
from cliprd_core.teacher_ensemble import TeacherShape, build_objective
from scripts.measure_models import LiveBytes
from tests.tiny import CONTEXT_LENGTH, tiny_config

TEACHER = {"config": tiny_config(embed_dim=48), "pretrained": "teacher.safetensors"}
ALL_TERMS = {"soft": 1.0, "gd": 1.0, "afd": 1.0, "mfd": 1.0}


def spec_with(**changes: Any) -> JobSpec:
    spec = {
        "name": "estimated",
        "teacher": TEACHER,
        "student": {"config": tiny_config()},
        "data": {"train": [{"type": "csv", "path": "pairs.tsv"}]},
        "training": {"precision": "fp32", "global_batch_size": 8},
    }
    return JobSpec.model_validate(merge_over(spec, changes))


def estimated(spec: JobSpec) -> MemoryEstimate:
    assert spec.student.config is not None
    return estimate_memory(spec, size_of_config(spec.student.config), [_size(teacher.config) for teacher in spec.teacher_fields.values()])


def _size(config: dict[str, Any] | None) -> ModelSize:
    assert config is not None
    return size_of_config(config)


def build(spec: JobSpec) -> StudentWithObjective:
    student = load_student(spec.student, seed=0)
    if not spec.objective.uses_student_logit_scale:
        student.model.logit_scale.requires_grad_(False)
    widths = [_size(teacher.config).embed_dim for teacher in spec.teacher_fields.values()]
    shapes = [TeacherShape(width, 10.0) for width in widths]
    return StudentWithObjective(student.model, build_objective(spec.objective, student_width=student.embed_dim, teachers=shapes), None)


def take_step(module: StudentWithObjective, batch_size: int, teacher_width: int) -> None:
    """Forward and backward, captions of full length."""
    image_size = module.student.visual.image_size[0]
    tokens = torch.zeros(batch_size, module.student.context_length, dtype=torch.long)
    tokens[:, -1] = 49_407
    features = [torch.randn(batch_size, teacher_width) if teacher_width else None for _ in range(2)]
    passes = WholeBatch(module)
    passes.backward(passes.forward(torch.randn(batch_size, 3, image_size, image_size), tokens, *features)["loss"])


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"objective": ALL_TERMS},
        {"recipe": "clip", "teacher": None},
        {"recipe": "clip_kd", "objective": {"task": 0.0, "hrd": 0.0}},
        {"teacher": {**TEACHER, "config": tiny_config()}},
        {"teacher": None, "teachers": [TEACHER, TEACHER]},
        {"teacher": None, "teachers": [TEACHER, TEACHER], "objective": {"teacher_combination": "average", **ALL_TERMS}},
        {"student": {"config": tiny_config() | {"init_logit_bias": -10.0}}},
    ],
)
def test_weights_gradients_and_moments_are_exact(changes: dict[str, Any]) -> None:
    spec = spec_with(**changes)
    module = build(spec)
    logit_bias = getattr(module.student, "logit_bias", None)
    optimizer = build_optimizer(module, spec.training)
    take_step(module, 8, sum(_size(teacher.config).embed_dim for teacher in spec.teacher_fields.values()))
    optimizer.step()

    held = sum(one.numel() for one in module.parameters())
    teachers = sum(_size(teacher.config).num_parameters for teacher in spec.teacher_fields.values())
    gradients = sum(one.grad.numel() for one in module.parameters() if one.grad is not None)
    moments = sum(state[name].numel() for state in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq"))
    estimate = estimated(spec)
    assert (estimate.weights, estimate.gradients, estimate.optimizer) == (4 * (held + teachers), 4 * gradients, 4 * moments)
    assert logit_bias is None or logit_bias.grad is None


@pytest.mark.parametrize(
    ("batch_size", "config"),
    [
        (8, tiny_config(width=64, image_size=96, layers=4, context_length=32)),
        (64, tiny_config(width=64, image_size=96, layers=4, context_length=32)),
        (512, tiny_config(layers=2)),
    ],
)
@pytest.mark.parametrize("objective", [{}, ALL_TERMS], ids=["default", "all terms"])
def test_the_peak_of_a_step_is_right_within_a_factor(batch_size: int, config: dict[str, Any], objective: dict[str, Any]) -> None:
    spec = spec_with(student={"config": config}, training={"global_batch_size": batch_size}, objective=objective)
    module = build(spec)
    with LiveBytes() as live, live.counting_saved_tensors():
        take_step(module, batch_size, 48)
    estimate = estimated(spec)
    # Weights were there before, and the teachers' passes would have come before. The estimate has all gradients beside all activations.
    assert 1.0 < (estimate.gradients + estimate.activations + estimate.objective) / live.peak < 1.35
    held = 4 * sum(one.numel() for one in module.parameters())
    assert estimate.least <= held + estimate.optimizer + live.peak


def test_what_a_spec_changes() -> None:
    plain = estimated(spec_with(training={"global_batch_size": 4096}))
    micro = estimated(spec_with(training={"global_batch_size": 4096, "micro_batch_size": 64}))
    assert micro.activations < plain.activations / 50
    assert micro.objective == plain.objective
    shared = estimated(spec_with(training={"global_batch_size": 4096}, resources={"num_processes": 8}))
    assert plain.activations / 9 < shared.activations < plain.activations / 7
    half = estimated(spec_with(training={"global_batch_size": 4096, "precision": "bf16"}))
    assert plain.activations * 0.4 < half.activations < plain.activations * 0.7
    assert half.optimizer == plain.optimizer
    on_cpu = estimated(spec_with(training={"global_batch_size": 4096, "precision": "bf16"}, resources={"device": "cpu"}))
    assert replace(on_cpu, objective=plain.objective) == plain
    assert plain.objective - on_cpu.objective == 4 * 8 * (2**23 - 2**21), "eight blocks, larger on a GPU"
    masked = estimated(spec_with(training={"global_batch_size": 4096}, objective={"mfd": 1.0}))
    assert masked.activations > plain.activations
    assert plain.total == plain.weights + plain.gradients + plain.optimizer + plain.activations + plain.objective


def test_a_large_teacher_that_runs_in_every_step_decides() -> None:
    teacher = {"config": tiny_config(width=512, image_size=96, context_length=CONTEXT_LENGTH), "pretrained": "teacher.safetensors"}
    stored, online = (
        estimated(spec_with(teacher=teacher, data={"teacher_views": views}, training={"global_batch_size": 4096})) for views in (1, 0)
    )
    assert online.activations > 3 * stored.activations


def test_counts_of_what_is_learned() -> None:
    spec = spec_with()
    student = _size(spec.student.config)
    assert num_trained_parameters(spec.objective, student) == student.num_parameters
    assert num_objective_parameters(spec.objective, 32, [32]) == 3
    assert num_objective_parameters(spec.objective, 32, [48]) == 3 + 2 * 32 * 48
    assert num_objective_parameters(spec.objective, 32, []) == 0
