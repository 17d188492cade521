"""What float32 costs: the blocked objective is as near to exact gradients as the dense functions are, where pairs are confident."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from cliprd_core import losses
from cliprd_core.objective import Objective
from cliprd_core.objective_spec import ObjectiveSpec

NUM_PAIRS, WIDTH, SCALE = 96, 64, 100.0
NO_TERM = {"task": 0.0, "fd": 0.0, "icl": 0.0, "hrd": 0.0, "vrd": 0.0, "xrd": 0.0}
DENSE: dict[str, Callable[..., Tensor]] = {
    "task": lambda *features, scale: losses.task(*features[:2], student_logit_scale=scale),
    "icl": lambda *features, scale: losses.icl(*features, cross_scale=scale),
    "hrd": lambda *features, scale: losses.hrd(*features, student_logit_scale=scale, teacher_logit_scale=SCALE),
    "soft": lambda *features, scale: losses.soft(*features, student_logit_scale=scale, teacher_scale=SCALE),
    "gd": lambda *features, scale: losses.gd(*features, student_logit_scale=scale, teacher_logit_scale=SCALE),
    "xrd": lambda *features, scale: losses.xrd(*features, cross_scale=scale),
    "vrd_kl": lambda *features, scale: losses.vrd_kl(*features, image_scale=scale, text_scale=scale),
    "vrd_ce_image": lambda *features, scale: losses.vrd_ce_image(*features[0::2], image_scale=scale),
    "vrd_ce_text": lambda *features, scale: losses.vrd_ce_text(*features[1::2], text_scale=scale),
}


def confident_features() -> list[Tensor]:
    """Float32 features of a student's and a teacher's images and texts. All resemble each other, so that logits are near 100, and a pair
    does so most, so that its softmax leaves the others some 1e-4."""
    generator = torch.Generator().manual_seed(0)

    def draw(num_rows: int = NUM_PAIRS) -> Tensor:
        return torch.randn(num_rows, WIDTH, generator=generator)

    pairs = 2 * draw(1) + draw()
    return [pairs + 0.3 * draw() for _ in range(4)]


def relative_errors(gradients: list[Tensor | None], exact: list[Tensor | None]) -> list[float]:
    """Of the gradients there are, in the Euclidean norm."""
    pairs = [(one.double(), other) for one, other in zip(gradients, exact, strict=True) if one is not None and other is not None]
    return [float((one - other).norm() / other.norm()) for one, other in pairs]


@pytest.mark.parametrize("term", DENSE)
def test_gradients_of_confident_pairs_are_as_exact_as_the_dense_form_s(term: str) -> None:
    def dense_gradients(dtype: torch.dtype) -> list[Tensor | None]:
        features = [one.to(dtype).requires_grad_(index < 2) for index, one in enumerate(confident_features())]
        scale = torch.tensor(SCALE, dtype=dtype)
        value = DENSE[term](*(losses.unit_rows(one) for one in features), scale=scale)
        return list(torch.autograd.grad(value, features[:2], allow_unused=True))

    objective = Objective(
        ObjectiveSpec(**(NO_TERM | {term: 1.0})),
        student_width=WIDTH,
        teacher_width=WIDTH,
        teacher_logit_scale=SCALE,
        max_block_elements=NUM_PAIRS * 30,
    )
    for parameter in objective.parameters():
        parameter.data.fill_(SCALE)
    image, text, teacher_image, teacher_text = (one.requires_grad_(index < 2) for index, one in enumerate(confident_features()))
    output = objective(
        student_image_features=image,
        student_text_features=text,
        student_logit_scale=torch.tensor(SCALE),
        teacher_image_features=teacher_image,
        teacher_text_features=teacher_text,
    )
    output.loss.backward()
    exact = dense_gradients(torch.float64)
    found, dense = relative_errors([image.grad, text.grad], exact), relative_errors(dense_gradients(torch.float32), exact)
    assert found
    assert all(0 < error < 1e-3 for error in dense), "the problem is neither trivial nor hopeless in float32"
    assert all(error <= 3 * of_dense for error, of_dense in zip(found, dense, strict=True)), (found, dense)
