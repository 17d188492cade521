"""Masked feature distillation: the masks, the term's value and gradient, and its way through the training step."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from cliprd_core import losses
from cliprd_core.objective import Objective
from cliprd_core.objective_spec import ObjectiveSpec
from cliprd_core.run_dir import METRICS_FILE, MetricsRecord, read_records
from cliprd_core.step_module import WholeBatch, mask_patches
from cliprd_core.stopping import StopRequest
from cliprd_core.trainer import Outcome, train
from tests.tiny import MODEL_IMAGE_SIZE, tiny_config, tiny_spec, write_shards, write_teacher
from tests.unit.test_grad_cache import KeptGraphs, assert_equal_steps, cached, gradients_of, make_batch, make_module

WITH_MFD = ObjectiveSpec(task=1, fd=0, icl=0, hrd=0, vrd=0, xrd=0, mfd=3)


@pytest.mark.parametrize(("ratio", "num_kept"), [(0.75, 4), (0.5, 8), (0.999, 1)])
def test_masks_hide_whole_patches_each_image_its_own(ratio: float, num_kept: int) -> None:
    torch.manual_seed(0)
    images = torch.randn(6, 3, 32, 32).abs() + 1
    masked = mask_patches(images, ratio, 8)
    patches = masked.unfold(2, 8, 8).unfold(3, 8, 8).permute(0, 2, 3, 1, 4, 5).reshape(6, 16, -1)
    is_kept = patches.ne(0).any(dim=2)
    assert is_kept.sum(dim=1).tolist() == [num_kept] * 6
    assert is_kept.equal(patches.ne(0).all(dim=2)), "a patch is kept whole or not at all"
    assert masked.eq(images).logical_or(masked.eq(0)).all()
    assert len({tuple(one.tolist()) for one in is_kept}) > 1
    assert mask_patches(torch.ones(2, 3, 20, 20), 0.5, 16).shape == (2, 3, 20, 20), "patches at the edge may be cut"


@pytest.mark.parametrize(("student_width", "teacher_width"), [(6, 6), (6, 8)])
def test_the_term_equals_its_equation(student_width: int, teacher_width: int) -> None:
    torch.manual_seed(0)
    objective = Objective(WITH_MFD, student_width=student_width, teacher_width=teacher_width, teacher_logit_scale=40.0).double()
    assert (objective.image_projection is None) == (student_width == teacher_width)
    assert objective.text_projection is None, "no term would give it a gradient"
    image, text, masked = torch.randn(3, 5, student_width, dtype=torch.float64).requires_grad_()
    teacher_image, teacher_text = torch.randn(2, 5, teacher_width, dtype=torch.float64)
    features = {"student_image_features": image, "student_text_features": text, "student_logit_scale": torch.tensor(20.0)}
    teacher = {"teacher_image_features": teacher_image, "teacher_text_features": teacher_text}
    output = objective(**features, **teacher, student_masked_image_features=masked)
    matched = masked if objective.image_projection is None else masked @ objective.image_projection.weight.T
    mfd = losses.mfd(losses.unit_rows(matched), losses.unit_rows(teacher_image))
    task = losses.task(losses.unit_rows(image), losses.unit_rows(text), student_logit_scale=torch.tensor(20.0, dtype=torch.float64))
    assert output.terms.keys() == {"task", "mfd"}
    torch.testing.assert_close(output.terms["mfd"], mfd.detach())
    torch.testing.assert_close(output.total, (task + 3 * mfd).detach())
    found, expected = (torch.autograd.grad(loss, [image, text, masked]) for loss in (output.loss, task + 3 * mfd))
    torch.testing.assert_close(found, expected)
    with pytest.raises(ValueError, match="student_masked_image_features"):
        objective(**features, **teacher)


def test_micro_batches_mask_alike_in_both_passes() -> None:
    module, batch = make_module(WITH_MFD, is_random=True), make_batch()
    expected = gradients_of(KeptGraphs(module, 4), module, batch)
    assert "mfd" in expected[0]["terms"]
    assert_equal_steps(gradients_of(cached(module, 4), module, batch), expected)


def test_masked_images_leave_running_statistics_alone() -> None:
    config = tiny_config(width=16, embed_dim=16)
    config["vision_cfg"] = {"image_size": MODEL_IMAGE_SIZE, "layers": [1, 1, 1, 1], "width": 8, "patch_size": None}
    statistics = []
    for weights in (WITH_MFD, ObjectiveSpec(task=1, fd=1, icl=0, hrd=0, vrd=0, xrd=0)):
        module = make_module(weights, config=config)
        gradients_of(WholeBatch(module), module, make_batch())
        statistics.append({name: buffer for name, buffer in module.named_buffers() if "running" in name or "tracked" in name})
        assert all(layer.track_running_stats for layer in module.modules() if isinstance(layer, nn.BatchNorm2d))
    assert statistics[0]
    torch.testing.assert_close(statistics[0], statistics[1], rtol=0, atol=0)


def test_a_run_reports_the_term(tmp_path) -> None:
    shards, teacher = write_shards(tmp_path / "shards", 32), write_teacher(tmp_path / "teacher", tiny_config(width=48, embed_dim=48))
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    spec = tiny_spec(shards, teacher=teacher, objective={"mfd": 2000.0}, training={"micro_batch_size": 3})
    assert train(spec, run_dir, StopRequest()) is Outcome.FINISHED
    values = [record.values["train/term/mfd"] for record, _ in read_records(run_dir / METRICS_FILE, MetricsRecord) if record.values]
    assert len(values) == 8
    assert 0 < values[-1] < values[0]


def test_alone_it_would_leave_texts_untrained() -> None:
    with pytest.raises(ValidationError, match="`mfd` alone"):
        ObjectiveSpec(task=0, fd=0, icl=0, hrd=0, vrd=0, xrd=0, mfd=1)
    assert ObjectiveSpec().mfd == 0
    assert WITH_MFD.needs_teacher
