"""What the data-parallel wrapper wraps: student and objective as one module, at the precision each needs."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import TypedDict

import torch
from torch import Tensor, nn

from cliprd_core.models import ClipModel
from cliprd_core.objective import Objective
from cliprd_core.spec import Precision

AUTOCAST_TYPES = {Precision.BF16: torch.bfloat16, Precision.FP16: torch.float16}


class StepLosses(TypedDict):
    """The objective's output as plain containers, which the data-parallel wrapper can look into."""

    loss: Tensor
    total: Tensor
    terms: dict[str, Tensor]
    weighted: dict[str, Tensor]


class StudentWithObjective(nn.Module):
    """All learned parameters in one module, so that one data-parallel wrapper reduces them all.

    The student runs under autocast; the objective always in fp32, on the student's unnormalised features.
    """

    def __init__(self, student: ClipModel, objective: Objective, autocast_type: torch.dtype | None) -> None:
        super().__init__()
        self.student = student
        self.objective = objective
        self._autocast_type = autocast_type

    def forward(
        self, images: Tensor, tokens: Tensor, teacher_image_features: Tensor | None, teacher_text_features: Tensor | None
    ) -> StepLosses:
        """(B, 3, H, W) images, (B, context) tokens, (B, Dt) teacher features or None; this process's rows."""
        with autocast(images.device, self._autocast_type):
            image_features, text_features = self.student.encode_image(images), self.student.encode_text(tokens)
        output = self.objective(
            student_image_features=image_features.float(),
            student_text_features=text_features.float(),
            student_logit_scale=self.student.logit_scale.exp().reshape(()),
            teacher_image_features=teacher_image_features,
            teacher_text_features=teacher_text_features,
        )
        return StepLosses(loss=output.loss, total=output.total, terms=output.terms, weighted=output.weighted)


def autocast(device: torch.device, autocast_type: torch.dtype | None) -> AbstractContextManager[None]:
    """torch's autocast to `autocast_type`; None: fp32 throughout."""
    context: AbstractContextManager[None] = torch.autocast(device.type, dtype=autocast_type, enabled=autocast_type is not None)
    return context
