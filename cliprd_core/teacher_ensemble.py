"""The objective of several teachers at once, made of those of one.

Sources: the ensembles of "MobileCLIP" (arXiv 2311.17049, section 4) and its open implementation of distillation, which either takes
the teachers' features side by side or averages the teachers' distributions. Both are here, each teacher with its own logit scale:

- ``concatenate``: with unit features t_k and scales σ_k of K teachers, the one teacher of features [√(σ_1/Σσ) t_1; …; √(σ_K/Σσ) t_K], which
  are unit rows again, and scale Σσ/K. Its logits are the mean of the teachers' logits, (1/K) Σ_k σ_k t_Ik t_Tkᵀ, and every term applies.
  With `soft_temperature`, T′ is the mean of the teachers' cosines, weighted by σ_k/Σσ, over the temperature.
- ``average``: every distillation term is the mean of that term over the teachers, (1/K) Σ_k term(teacher k), with projections and learned
  scales of its own for each. For `hrd` and `soft` the gradient is that of the teachers' averaged distribution.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cliprd_core.losses import unit_rows
from cliprd_core.objective import Objective, ObjectiveOutput, combined_objective
from cliprd_core.objective_features import StudentFeatures, TeacherFeatures
from cliprd_core.objective_spec import ObjectiveSpec, TeacherCombination


@dataclass(frozen=True)
class TeacherShape:
    """What the objective has to know of a teacher."""

    width: int  # D of its features
    logit_scale: float  # σ_t, exponentiated


def build_objective(weights: ObjectiveSpec, *, student_width: int, teachers: Sequence[TeacherShape]) -> Objective | TeacherEnsemble:
    """The objective for no, one or several teachers. Its initial projections come from torch's global generator.

    Raises:
        ValueError: the weights need what there is not.
    """
    if len(teachers) > 1:
        return TeacherEnsemble(weights, student_width=student_width, teachers=teachers)
    if not teachers:
        return Objective(weights, student_width=student_width)
    (teacher,) = teachers
    return Objective(weights, student_width=student_width, teacher_width=teacher.width, teacher_logit_scale=teacher.logit_scale)


@dataclass(frozen=True)
class _SideBySide:
    """Makes the one teacher's rows of several teachers' features."""

    widths: list[int]
    shares: list[float]  # of the scales, adding up to 1

    def __call__(self, side_by_side: Tensor) -> Tensor:
        """(b, sum of the widths). Not normalised once more: where one teacher's row is zero, the others keep their shares of the logits."""
        parts = zip(torch.split(side_by_side, self.widths, dim=1), self.shares, strict=True)
        return torch.cat([unit_rows(features_bD) * math.sqrt(share) for features_bD, share in parts], dim=1)


class TeacherEnsemble(nn.Module):
    """An objective as `cliprd_core.objective.Objective` is, whose teacher's features are those of several, side by side."""

    def __init__(self, weights: ObjectiveSpec, *, student_width: int, teachers: Sequence[TeacherShape]) -> None:
        """`teachers`: two or more, in the order in which their features stand side by side."""
        super().__init__()
        assert len(teachers) > 1
        self.weights = weights
        self._widths = [teacher.width for teacher in teachers]
        self._concatenates = weights.teacher_combination is TeacherCombination.CONCATENATE
        members = teachers
        normalise_teacher: Callable[[Tensor], Tensor] = unit_rows
        if self._concatenates:
            sum_of_scales = sum(teacher.logit_scale for teacher in teachers)
            members = [TeacherShape(sum(self._widths), sum_of_scales / len(teachers))]
            normalise_teacher = _SideBySide(self._widths, [teacher.logit_scale / sum_of_scales for teacher in teachers])
        self.objectives = nn.ModuleList(
            Objective(
                weights,
                student_width=student_width,
                teacher_width=member.width,
                teacher_logit_scale=member.logit_scale,
                normalise_teacher=normalise_teacher,
            )
            for member in members
        )

    def scales(self) -> dict[str, Tensor]:
        """As `Objective.scales`; with `average`, each name ends in its teacher's number."""
        members = self._members()
        if self._concatenates:
            return members[0].scales()
        return {f"{name}_{index}": scale for index, member in enumerate(members) for name, scale in member.scales().items()}

    def clamp_scales(self) -> None:
        """As `Objective.clamp_scales`."""
        for member in self._members():
            member.clamp_scales()

    def forward(
        self,
        *,
        student_image_features: Tensor,
        student_text_features: Tensor,
        student_logit_scale: Tensor,
        teacher_image_features: Tensor | None = None,
        teacher_text_features: Tensor | None = None,
        student_masked_image_features: Tensor | None = None,
        row_counts: list[int] | None = None,
    ) -> ObjectiveOutput:
        """As `Objective.forward`; `teacher_…_features` are (b, sum of the teachers' widths), the teachers' features side by side."""
        student = StudentFeatures(student_image_features, student_text_features, student_logit_scale, student_masked_image_features)
        images = self._of_members("teacher_image_features", teacher_image_features)
        texts = self._of_members("teacher_text_features", teacher_text_features)
        teachers = [TeacherFeatures(*both) for both in zip(images, texts, strict=True)]
        return combined_objective(self._members(), student, teachers, row_counts)

    def _members(self) -> list[Objective]:
        return [member for member in self.objectives if isinstance(member, Objective)]

    def _of_members(self, name: str, side_by_side: Tensor | None) -> Sequence[Tensor]:
        """The features that each objective's teacher has, (b, its width)."""
        if side_by_side is None:
            raise ValueError(f"`{name}` is missing, but the objective has terms that need a teacher")
        if side_by_side.dim() != 2 or side_by_side.shape[1] != sum(self._widths):
            raise ValueError(f"`{name}` must be of shape (pairs, {sum(self._widths)}), not {tuple(side_by_side.shape)}")
        return [side_by_side] if self._concatenates else torch.split(side_by_side, self._widths, dim=1)
