"""The features that the objective's terms meet: checked, normalised, and gathered over ranks.

Shapes: b pairs on this rank, B on all, D the width of the features.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cliprd_core.distributed import gather_with_grad
from cliprd_core.losses import unit_rows


@dataclass(frozen=True)
class StudentFeatures:
    """What the student makes of this rank's pairs, (b, student_width) each, not normalised, and its scale."""

    image: Tensor
    text: Tensor
    logit_scale: Tensor  # one element, exponentiated
    masked_image: Tensor | None

    def check(self, width: int) -> None:
        """
        Raises:
            ValueError: a shape is not as above.
        """
        check_shapes({"student_image_features": self.image, "student_text_features": self.text}, len(self.image), width)
        if self.logit_scale.numel() != 1:
            raise ValueError(f"`student_logit_scale` must be one number, not of shape {tuple(self.logit_scale.shape)}")


@dataclass(frozen=True)
class TeacherFeatures:
    """What one teacher makes of this rank's pairs, (b, teacher_width) each, normalised or not."""

    image: Tensor | None
    text: Tensor | None


@dataclass(frozen=True)
class Side:
    """One modality's normalised features of this rank's pairs."""

    own: Tensor  # (b, student_width)
    matched: Tensor  # (b, teacher_width), or `own` itself where the widths are equal
    teacher: Tensor | None  # (b, teacher_width)

    def fused(self, fusion: nn.Linear | None) -> Tensor | None:
        """afd's features, (b, student_width)."""
        if fusion is None or self.teacher is None:
            return None
        both = torch.cat((self.own, self.teacher), dim=1)
        return unit_rows(F.linear(both, fusion.weight.to(both.dtype), fusion.bias.to(both.dtype)))


def projected(student_bD: Tensor, projection: nn.Linear, dtype: torch.dtype) -> Tensor:
    """The student's raw features in the teacher's width, normalised."""
    return unit_rows(F.linear(student_bD.to(dtype), projection.weight.to(dtype)))


class GatherOnce:
    """`gather_with_grad`, once for each tensor, however many terms and teachers ask for it."""

    def __init__(self, row_counts: list[int]) -> None:
        """`row_counts`: every rank's b, by rank."""
        self._row_counts = row_counts
        self._gathered: dict[int, tuple[Tensor, Tensor]] = {}  # holds what was given, so that its id stays its own

    def of(self, rows_bD: Tensor) -> Tensor:
        """(B, D)."""
        if id(rows_bD) not in self._gathered:
            self._gathered[id(rows_bD)] = (rows_bD, gather_with_grad(rows_bD, self._row_counts))
        return self._gathered[id(rows_bD)][1]


def check_shapes(features: Mapping[str, Tensor | None], num_pairs: int, width: int) -> None:
    """
    Raises:
        ValueError: features are missing, or not of shape (num_pairs, width).
    """
    for name, tensor in features.items():
        if tensor is None:
            raise ValueError(f"`{name}` is missing, but the objective has terms that need a teacher")
        if tensor.shape != (num_pairs, width):
            raise ValueError(
                f"`{name}` must be of shape ({num_pairs}, {width}): one row per image, as wide as its model's embedding,"
                f" not {tuple(tensor.shape)}"
            )
