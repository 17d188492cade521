"""CLIP-RD's objective in its plain dense form, as the reference implementation computes it: whole (B, B) matrices, autograd."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cliprd_core import losses
from cliprd_core.objective import INITIAL_SCALE, ObjectiveOutput
from cliprd_core.objective_spec import ObjectiveSpec


class DenseObjective(nn.Module):
    """Takes the place of `cliprd_core.objective.Objective` for one process, equal widths and CLIP-RD's six terms."""

    def __init__(self, weights: ObjectiveSpec, *, student_width: int, teacher_width: int, teacher_logit_scale: float) -> None:
        super().__init__()
        if student_width != teacher_width:
            raise ValueError(f"the dense form has no projections: widths must be equal, not {student_width} and {teacher_width}")
        self.weights = weights
        self.teacher_logit_scale = teacher_logit_scale
        self.cross_scale, self.image_scale, self.text_scale = (nn.Parameter(torch.tensor(INITIAL_SCALE)) for _ in range(3))

    def forward(
        self,
        *,
        student_image_features: Tensor,
        student_text_features: Tensor,
        student_logit_scale: Tensor,
        teacher_image_features: Tensor,
        teacher_text_features: Tensor,
        student_masked_image_features: None = None,
        row_counts: list[int] | None = None,
    ) -> ObjectiveOutput:
        """All features (B, D), not normalised; needs a teacher."""
        del student_masked_image_features, row_counts
        with torch.autocast(student_image_features.device.type, enabled=False):
            student = (losses.unit_rows(student_image_features), losses.unit_rows(student_text_features))
            teacher = (losses.unit_rows(teacher_image_features), losses.unit_rows(teacher_text_features))
            scales = {"image_scale": self.image_scale, "text_scale": self.text_scale}
            logit_scales = {"student_logit_scale": student_logit_scale, "teacher_logit_scale": self.teacher_logit_scale}
            terms = {
                "task": losses.task(*student, student_logit_scale=student_logit_scale),
                "fd": losses.fd(*student, *teacher),
                "icl": losses.icl(*student, *teacher, cross_scale=self.cross_scale),
                "hrd": losses.hrd(*student, *teacher, **logit_scales),
                "vrd": losses.vrd_kl(*student, *teacher, **scales)
                + losses.vrd_ce_image(student[0], teacher[0], image_scale=self.image_scale)
                + losses.vrd_ce_text(student[1], teacher[1], text_scale=self.text_scale),
                "xrd": losses.xrd(*student, *teacher, cross_scale=self.cross_scale),
            }
            weighted = {name: value * getattr(self.weights, name) for name, value in terms.items()}
            total = torch.stack(list(weighted.values())).sum()
        return ObjectiveOutput(total, total.detach(), _detached(terms), _detached(weighted))


def _detached(values: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach() for name, value in values.items()}
