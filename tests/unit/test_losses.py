"""The dense reference: hand-computed values, the published numbers' float64 record, and what carries a gradient."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import numpy_objective as oracle
import pytest
import torch
from torch import Tensor

from cliprd_core import losses

GOLDEN = sorted((Path(__file__).parents[1] / "golden").glob("*.npz"))


def test_cross_entropy_by_hand() -> None:
    logits = torch.tensor([[math.log(3.0), 0.0], [0.0, math.log(4.0)]])
    assert losses.cross_entropy(logits).item() == pytest.approx(-(math.log(3 / 4) + math.log(4 / 5)) / 2)


def test_kl_by_hand() -> None:
    p = torch.tensor([[math.log(3.0), 0.0]])
    q = torch.tensor([[0.0, 0.0]])
    assert losses.kl_divergence(p, q).item() == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5))


def test_kl_is_zero_only_for_equal_softmaxes_and_its_target_has_no_gradient() -> None:
    p = torch.randn(4, 4, dtype=torch.float64, requires_grad=True)
    q = torch.randn(4, 4, dtype=torch.float64, requires_grad=True)
    assert losses.kl_divergence(p, p + 3).item() == pytest.approx(0, abs=1e-12)
    assert losses.kl_divergence(p, q).item() > 0
    losses.kl_divergence(p, q).backward()
    assert p.grad is None
    assert q.grad is not None


def test_soft_cross_entropy_by_hand() -> None:
    p, q = torch.tensor([[math.log(3.0), 0.0]]), torch.tensor([[0.0, math.log(4.0)]])
    assert losses.soft_cross_entropy(p, q).item() == pytest.approx(-(0.75 * math.log(1 / 5) + 0.25 * math.log(4 / 5)))


def test_contrastive_gradients_are_those_of_the_loss() -> None:
    image, text = (torch.randn(6, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    expected = torch.autograd.grad(6 * losses.task(image, text, student_logit_scale=3.0), (image, text))
    torch.testing.assert_close(losses.contrastive_gradients(image, text, 3.0), expected)


def test_unit_rows_of_a_zero_vector_is_zero_with_zero_gradient() -> None:
    x = torch.tensor([[3.0, 4.0], [0.0, 0.0]], requires_grad=True)
    unit = losses.unit_rows(x)
    torch.testing.assert_close(unit, torch.tensor([[0.6, 0.8], [0.0, 0.0]]))
    unit.sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, torch.tensor([[0.032, -0.024], [0.0, 0.0]]))


@pytest.mark.parametrize(("given", "computed"), [(torch.bfloat16, torch.float32), (torch.float16, torch.float32), (torch.float64,) * 2])
def test_unit_rows_computes_in_float32_at_least(given: torch.dtype, computed: torch.dtype) -> None:
    unit = losses.unit_rows(torch.full((2, 512), 300.0, dtype=given))  # in float16 the squares' sum overflows
    assert unit.dtype == computed
    torch.testing.assert_close(unit.square().sum(dim=1), torch.ones(2, dtype=computed))


def test_unit_rows_gradient_is_the_derivative() -> None:
    assert torch.autograd.gradcheck(losses.unit_rows, (torch.randn(3, 4, dtype=torch.float64, requires_grad=True),))


def _dense(student: tuple[Tensor, Tensor], teacher: tuple[Tensor, Tensor], student_scale: Tensor, meta: dict) -> dict[str, Tensor]:
    scale = torch.tensor(math.log(1 / 0.07)).double()
    image, text = (losses.unit_rows(one) for one in student)
    vertical = {"image_scale": scale, "text_scale": scale}
    hrd_scales = {"student_logit_scale": student_scale, "teacher_logit_scale": meta["teacher_logit_scale"]}
    return {
        "task": losses.task(image, text, student_logit_scale=student_scale),
        "fd": losses.fd(image, text, *teacher),
        "icl": losses.icl(image, text, *teacher, cross_scale=scale),
        "hrd": losses.hrd(image, text, *teacher, **hrd_scales),
        "vrd_kl": losses.vrd_kl(image, text, *teacher, **vertical),
        "vrd_ce_image": losses.vrd_ce_image(image, teacher[0], image_scale=scale),
        "vrd_ce_text": losses.vrd_ce_text(text, teacher[1], text_scale=scale),
        "xrd": losses.xrd(image, text, *teacher, cross_scale=scale),
        "gd": losses.gd(image, text, *teacher, **hrd_scales),
        "soft": losses.soft(image, text, *teacher, student_logit_scale=student_scale, teacher_scale=meta["teacher_logit_scale"]),
    }


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_golden(path: Path) -> None:
    data = np.load(path)
    meta = json.loads(str(data["meta"]))
    features = {name: torch.from_numpy(data[name]) for name in data.files if name != "meta"}
    student = (features["student_image_features"].requires_grad_(), features["student_text_features"].requires_grad_())
    teacher = (features["teacher_image_features"], features["teacher_text_features"])
    log_scale = torch.tensor(meta["student_logit_scale"], dtype=torch.float64).log().requires_grad_()
    weights = {"task": 1.0} | meta["weights"]
    dense = _dense(student, teacher, log_scale.exp(), meta)
    weighted = {part: weights[part.split("_")[0]] * dense[part] for part in meta["weighted_losses"]}
    assert {part: value.item() for part, value in weighted.items()} == pytest.approx(meta["weighted_losses"], rel=1e-6)
    sum(weighted.values(), torch.zeros(())).backward()
    for feature, name in zip(student, ("grad_student_image_features", "grad_student_text_features"), strict=True):
        torch.testing.assert_close(feature.grad, features[name], rtol=1e-6, atol=1e-12)
    assert log_scale.grad is not None
    assert log_scale.grad.item() == pytest.approx(meta["grad_log_student_logit_scale"], rel=1e-6)


def test_equals_the_numpy_version() -> None:
    generator = np.random.default_rng(1)
    student_image, student_text, teacher_image, teacher_text = (generator.normal(size=(7, 5)) for _ in range(4))
    scale = math.log(1 / 0.07)
    variables = oracle.Variables(student_image, student_text, math.log(20.0), *[float(torch.tensor(scale))] * 3)
    expected = oracle.terms(variables, oracle.Teacher(teacher_image, teacher_text, 50.0))
    teacher = (losses.unit_rows(torch.from_numpy(teacher_image)), losses.unit_rows(torch.from_numpy(teacher_text)))
    student = (torch.from_numpy(student_image), torch.from_numpy(student_text))
    values = _dense(student, teacher, torch.tensor(20.0, dtype=torch.float64), {"teacher_logit_scale": 50.0})
    del expected["vrd"]
    assert {part: value.item() for part, value in values.items()} == pytest.approx(expected, rel=1e-12)
