"""Gradient distillation in blocks: the one term that rests on products of softmaxes with features, not on softmaxes alone.

With Z = σ_s s_I s_Tᵀ, E = ½[softmax of Z's rows + softmax of its columns] − 1, the contrastive loss, summed over pairs, has the
gradients G_I = σ_s E s_T and G_T = σ_s Eᵀ s_I; H_I and H_T are the teacher's. `gd` is their mean squared difference. What belongs
here is its value and its gradient through E, σ_s and the features, a block of rows at a time. Between the passes only (B, D)
matrices are kept: the differences, and the sum over each column that a column-softmax's gradient needs.

Shapes: b pairs on this rank, B on all, r in a block, D the width of the features.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cliprd_core.distributed import all_reduce_sum
from cliprd_core.objective_similarity import Gradients, Similarity
from cliprd_core.objective_terms import Settings


def add_gradient_distillation(
    settings: Settings, student_logits: Similarity, teacher_logits: Similarity, gradients: Gradients, blocks: list[slice]
) -> Tensor:
    """Add the weighted gradients of one teacher's `gd` to their buffers. A collective.

    Both models' similarities have their columns' sums already.

    Returns:
        This rank's share of the unweighted value, 0-d.
    """
    student, teacher = _Contrast(settings, student_logits, blocks), _Contrast(settings, teacher_logits, blocks)
    image_grad_bD, text_grad_BD = student.feature_gradients()
    teacher_image_grad_bD, teacher_text_grad_BD = teacher.feature_gradients()
    image_difference_bD = image_grad_bD - teacher_image_grad_bD
    text_difference_BD = all_reduce_sum(text_grad_BD - teacher_text_grad_BD)

    mean = settings.teacher_share / text_difference_BD.numel()
    own = slice(settings.first_row, settings.first_row + settings.num_rows)
    value = (image_difference_bD.square().sum() + text_difference_BD[own].square().sum()) * mean
    factor = 2 * mean * settings.weights["gd"]
    upstream = (image_difference_bD.mul_(factor), text_difference_BD.mul_(factor))
    student_logits.add_scale_gradient(((upstream[0] * image_grad_bD).sum() + (upstream[1] * text_grad_BD).sum()) / student_logits.scale)
    if student_logits.needs_gradient:
        student.add_gradients(*upstream, gradients)
    return value


class _Contrast:
    """One model's contrastive loss: softmaxes of its similarities, block by block."""

    def __init__(self, settings: Settings, similarity: Similarity, blocks: list[slice]) -> None:
        self._first_row, self._blocks = settings.first_row, blocks
        self._similarity = similarity
        self._image_bD, self._text_BD = similarity.rows_bD, similarity.columns_BD

    def _softmaxes(self, logits_rB: Tensor) -> tuple[Tensor, Tensor]:
        """Over rows, and over columns; (r, B) each."""
        return logits_rB.softmax(dim=1), self._similarity.column_log_softmax(logits_rB).exp_()

    def _errors(self, block: slice, rows_rB: Tensor, columns_rB: Tensor) -> Tensor:
        """E, (r, B)."""
        errors_rB = (rows_rB + columns_rB).div_(2)
        first = self._first_row + block.start
        errors_rB[:, first : first + len(errors_rB)].diagonal().sub_(1)
        return errors_rB

    def feature_gradients(self) -> tuple[Tensor, Tensor]:
        """G_I of this rank's pairs, (b, D), and its rows' part of G_T, (B, D)."""
        image_grad_bD, text_grad_BD = torch.zeros_like(self._image_bD), torch.zeros_like(self._text_BD)
        scale = self._similarity.scale
        for block in self._blocks:
            errors_rB = self._errors(block, *self._softmaxes(self._similarity.logits(block)))
            image_grad_bD[block] = (errors_rB @ self._text_BD) * scale
            text_grad_BD.addmm_(errors_rB.T, self._image_bD[block] * scale)
        return image_grad_bD, text_grad_BD

    def add_gradients(self, image_upstream_bD: Tensor, text_upstream_BD: Tensor, gradients: Gradients) -> None:
        """Back through G_I and G_T into the features and, through the softmaxes, into the logits."""
        upstream = (image_upstream_bD, text_upstream_BD)
        column_sums_B = self._text_BD.new_zeros(len(self._text_BD))
        for block in self._blocks:
            columns_rB = self._similarity.column_log_softmax(self._similarity.logits(block)).exp_()
            column_sums_B += columns_rB.mul_(self._half_error_gradient(block, *upstream)).sum(dim=0)
        column_sums_B = all_reduce_sum(column_sums_B)
        for block in self._blocks:
            self._add_block(block, *upstream, column_sums_B, gradients)

    def _half_error_gradient(self, block: slice, image_upstream_bD: Tensor, text_upstream_BD: Tensor) -> Tensor:
        """Half of the gradient of E, (r, B)."""
        scale = self._similarity.scale
        grad_rB = (image_upstream_bD[block] * scale) @ self._text_BD.T
        return grad_rB.addmm_(self._image_bD[block] * scale, text_upstream_BD.T).div_(2)

    def _add_block(
        self, block: slice, image_upstream_bD: Tensor, text_upstream_BD: Tensor, column_sums_B: Tensor, gradients: Gradients
    ) -> None:
        logits_rB, scale = self._similarity.logits(block), self._similarity.scale
        rows_rB, columns_rB = self._softmaxes(logits_rB)
        errors_rB = self._errors(block, rows_rB, columns_rB)
        if (grad_image_bD := gradients.of(self._image_bD)) is not None:
            grad_image_bD[block] += (errors_rB @ text_upstream_BD) * scale
        if (grad_text_BD := gradients.of(self._text_BD)) is not None:
            grad_text_BD.addmm_(errors_rB.T, image_upstream_bD[block] * scale)
        half_rB = self._half_error_gradient(block, image_upstream_bD, text_upstream_BD)
        row_sums_r1 = (rows_rB * half_rB).sum(dim=1, keepdim=True)
        grad_logits_rB = rows_rB.mul_(half_rB - row_sums_r1).add_(columns_rB.mul_(half_rB.sub_(column_sums_B)))
        self._similarity.add_gradient(block, grad_logits_rB, logits_rB)
