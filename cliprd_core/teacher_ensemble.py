"""The objective of several teachers at once, made of objectives of one.

Sources: the ensembles of "MobileCLIP" (arXiv 2311.17049, section 4) and its open implementation of distillation, which either takes
the teachers' features side by side or averages the teachers' distributions. Both are here, each teacher with its own logit scale:

- ``concatenate``: with unit features t_k and scales σ_k of K teachers, the one teacher of features [√(σ_1/Σσ) t_1; …; √(σ_K/Σσ) t_K], which
  are unit rows again, and scale Σσ/K. Its logits are the mean of the teachers' logits, (1/K) Σ_k σ_k t_Ik t_Tkᵀ, and every term applies.
- ``average``: every distillation term is the mean of that term over the teachers, (1/K) Σ_k term(teacher k), with projections and learned
  scales of its own for each. For `hrd` and `soft` the gradient is that of the teachers' averaged distribution.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cliprd_core.losses import compute_dtype, unit_rows
from cliprd_core.objective import Objective, ObjectiveOutput
from cliprd_core.objective_spec import ObjectiveSpec, TeacherCombination

_WEIGHTS_OF_TEACHERS = ("fd", "icl", "hrd", "vrd", "xrd", "mfd", "soft", "gd", "afd", "vrd_kl", "vrd_ce_image", "vrd_ce_text")


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


class TeacherEnsemble(nn.Module):
    """An objective as `cliprd_core.objective.Objective` is, whose teacher's features are those of several, side by side.

    With `average` the student's features are gathered over ranks once for each teacher.
    """

    def __init__(self, weights: ObjectiveSpec, *, student_width: int, teachers: Sequence[TeacherShape]) -> None:
        """`teachers`: two or more, in the order in which their features stand side by side."""
        super().__init__()
        assert len(teachers) > 1
        self.weights = weights
        self._widths = [teacher.width for teacher in teachers]
        self._logit_scales = [teacher.logit_scale for teacher in teachers]
        self._concatenates = weights.teacher_combination is TeacherCombination.CONCATENATE
        members = [TeacherShape(sum(self._widths), sum(self._logit_scales) / len(teachers))] if self._concatenates else teachers
        self.objectives = nn.ModuleList(
            Objective(
                member_weights,
                student_width=student_width,
                teacher_width=member.width,
                teacher_logit_scale=member.logit_scale,
            )
            for member, member_weights in zip(members, _share_weights(weights, len(members)), strict=True)
        )

    def scales(self) -> dict[str, Tensor]:
        """As `Objective.scales`; with `average`, each name ends in its teacher's number."""
        if self._concatenates:
            return self._member(0).scales()
        return {f"{name}_{index}": scale for index in range(len(self.objectives)) for name, scale in self._member(index).scales().items()}

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
        images = self._of_members("teacher_image_features", teacher_image_features)
        texts = self._of_members("teacher_text_features", teacher_text_features)
        outputs: list[ObjectiveOutput] = [
            member(
                student_image_features=student_image_features,
                student_text_features=student_text_features,
                student_logit_scale=student_logit_scale,
                teacher_image_features=image_bD,
                teacher_text_features=text_bD,
                student_masked_image_features=student_masked_image_features,
                row_counts=row_counts,
            )
            for member, image_bD, text_bD in zip(self.objectives, images, texts, strict=True)
        ]
        return outputs[0] if len(outputs) == 1 else _mean(outputs)

    def _member(self, index: int) -> Objective:
        member = self.objectives[index]
        assert isinstance(member, Objective)
        return member

    def _of_members(self, name: str, side_by_side: Tensor | None) -> list[Tensor]:
        """The features that each objective's teacher has, (b, its width)."""
        if side_by_side is None:
            raise ValueError(f"`{name}` is missing, but the objective has terms that need a teacher")
        if side_by_side.dim() != 2 or side_by_side.shape[1] != sum(self._widths):
            raise ValueError(f"`{name}` must be of shape (pairs, {sum(self._widths)}), not {tuple(side_by_side.shape)}")
        features = list(torch.split(side_by_side, self._widths, dim=1))
        if not self._concatenates:
            return features
        dtype = compute_dtype(side_by_side)
        shares = [math.sqrt(scale / sum(self._logit_scales)) for scale in self._logit_scales]
        return [torch.cat([unit_rows(one.to(dtype)) * share for one, share in zip(features, shares, strict=True)], dim=1)]


def _share_weights(weights: ObjectiveSpec, num_members: int) -> list[ObjectiveSpec]:
    """The distillation weights divided by the number of objectives; the first one has `task`, which knows no teacher."""
    shared = {name: value / num_members for name in _WEIGHTS_OF_TEACHERS if (value := getattr(weights, name)) is not None}
    first = weights.model_copy(update=shared)
    return [first] + [first.model_copy(update={"task": 0.0}) for _ in range(num_members - 1)]


def _mean(outputs: Sequence[ObjectiveOutput]) -> ObjectiveOutput:
    """Of objectives with shared weights: losses add up, and each term is the mean over those that have it."""

    def of(name: str) -> list[ObjectiveOutput]:
        return [output for output in outputs if name in output.terms]

    names = list(outputs[0].terms)  # the first has them all
    return ObjectiveOutput(
        loss=torch.stack([output.loss for output in outputs]).sum(),
        total=torch.stack([output.total for output in outputs]).sum(),
        terms={name: torch.stack([output.terms[name] for output in of(name)]).mean() for name in names},
        weighted={name: torch.stack([output.weighted[name] for output in of(name)]).sum() for name in names},
    )
