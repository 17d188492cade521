"""The objective's arithmetic in bounded memory: every term's value and gradient, a block of rows at a time.

Dense, the objective needs a dozen (B, B) matrices. Here no more than a few blocks of `max_block_elements` exist at once, and
the result is the same to rounding. What belongs here is that computation on normalised features; which features, weights and
scales there are is ``cliprd_core.objective``'s business, and which terms follow from them ``cliprd_core.objective_terms``'s.

Each rank holds the rows of its own pairs against all columns. Two passes over its blocks:

1. the logarithm of every column's sum of exponentials, summed over ranks (a row lies on one rank and needs no such pass);
2. each block again: its softmaxes over rows and over columns, the terms' values, and at once the gradients.

The gradients are thus made in the forward pass and only scaled in the backward pass, so that no block is ever computed a third
time and nothing of size (B, B) is kept. A (B, B) similarity costs one matrix product per pass, and one for each side that has a
gradient: 18 for the whole objective, against 22 in the plain dense form.

Shapes: b pairs on this rank, B on all, r in a block, D the width of the features.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from cliprd_core.distributed import all_reduce_logsumexp
from cliprd_core.objective_gradients import add_gradient_distillation
from cliprd_core.objective_terms import PARTS, Gradients, Group, Inputs, Settings, Similarities, Similarity, active_groups, contrasts


def blocked_objective(settings: Settings, inputs: Inputs) -> tuple[Tensor, Tensor]:
    """This rank's share of the objective. A collective: every rank must call it.

    Returns:
        share: 0-d, differentiable once with respect to the student's features and the scales. The sum of the shares of all
            ranks is the weighted total of the global batch, and the sum over ranks of their gradients is its gradient.
        values: (len(PARTS),) float64, detached: this rank's share of each unweighted term, 0 where its weight is 0.
    """
    share, values = _BlockedObjective.apply(settings, *inputs)
    return share, values


class _BlockedObjective(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, settings: Settings, *tensors: Tensor | None) -> tuple[Tensor, Tensor]:
        gradients = Gradients(tensors, ctx.needs_input_grad[1:])
        values = _Pass(settings, Inputs(*tensors), gradients).run()
        ctx.save_for_backward(*gradients.in_order())
        share = sum(settings.weights[part] * values[part] for part in PARTS)
        assert isinstance(share, Tensor)
        stacked = torch.stack([values[part] for part in PARTS])
        ctx.mark_non_differentiable(stacked)
        ctx.set_materialize_grads(False)
        return share.to(next(tensor.dtype for tensor in reversed(tensors) if tensor is not None)), stacked

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_share: Tensor | None, _grad_values: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad_share is None:
            return (None,) * (1 + len(ctx.saved_tensors))
        return None, *(None if gradient is None else gradient * grad_share.to(gradient.dtype) for gradient in ctx.saved_tensors)


class _Pass:
    """One computation of the objective: adds gradients to their buffers and returns the terms' values."""

    def __init__(self, settings: Settings, inputs: Inputs, gradients: Gradients) -> None:
        self._settings, self._inputs, self._gradients = settings, inputs, gradients
        device = next(tensor.device for tensor in reversed(inputs) if tensor is not None)
        self._values = {part: torch.zeros((), dtype=torch.float64, device=device) for part in PARTS}

    def run(self) -> dict[str, Tensor]:
        settings = self._settings
        similarities = Similarities(self._gradients)
        groups = active_groups(settings, self._inputs, similarities)
        contrast = contrasts(settings, self._inputs, similarities) if settings.weights["gd"] else None
        blocks = list(_blocks(settings.num_rows, max(1, settings.max_block_elements // settings.num_columns)))
        self._sum_columns(list(similarities), blocks)
        for group in groups:
            for block in blocks:
                self._add_block(group, block)
        mean = 1 / (2 * settings.num_columns)  # every one of those terms is half a sum of means over rows and over columns
        self._gradients.multiply_(mean)
        for value in self._values.values():
            value.mul_(mean)
        if settings.weights["fd"]:
            self._add_fd()
        if contrast is not None:
            self._values["gd"] += add_gradient_distillation(settings, *contrast, self._gradients, blocks)
        return self._values

    def _sum_columns(self, similarities: list[Similarity], blocks: list[slice]) -> None:
        """The first pass."""
        if not similarities:
            return
        local_SB = torch.stack([similarity.local_column_logsumexp(blocks) for similarity in similarities])
        for similarity, total_B in zip(similarities, all_reduce_logsumexp(local_SB), strict=True):
            similarity.column_logsumexp_B = total_B

    def _add_block(self, group: Group, block: slice) -> None:
        """The second pass over one block."""
        logits = {similarity: similarity.logits(block) for similarity in group.similarities}
        grads = {similarity: torch.zeros_like(logits[similarity]) for similarity in group.similarities if similarity.needs_gradient}
        if group.divergences or not all(term.columns_only for term in group.cross_entropies):
            self._add_softmaxes(group, block, {one: logits[one].log_softmax(dim=1) for one in logits}, grads, is_columns=False)
        self._add_softmaxes(group, block, {one: logits[one] - one.column_logsumexp_B for one in logits}, grads, is_columns=True)
        for similarity, grad_rB in grads.items():
            similarity.add_gradient(block, grad_rB, logits[similarity])

    def _add_softmaxes(
        self, group: Group, block: slice, log_p: dict[Similarity, Tensor], grads: dict[Similarity, Tensor], *, is_columns: bool
    ) -> None:
        """Values, and gradients of the logits, of all terms of a group in one direction: softmaxes over rows, or over columns.

        `log_p` are the softmaxes' logarithms, (r, B) each; they are overwritten.
        """
        cross_entropies = [term for term in group.cross_entropies if is_columns or not term.columns_only]
        for term in cross_entropies:
            self._values[term.part] -= self._diagonal(log_p[term.logits], block).sum()
        differences = [
            -log_p[relation.logits] if relation.with_entropy else log_p[relation.target] - log_p[relation.logits]
            for relation in group.divergences
        ]
        p = {similarity: log_p_rB.exp_() for similarity, log_p_rB in log_p.items()}  # in place: one block less, and log_p is done with
        for term in cross_entropies:
            if term.logits in grads:
                grads[term.logits].add_(p[term.logits], alpha=term.weight)
                self._diagonal(grads[term.logits], block).sub_(term.weight)
        for relation, difference_rB in zip(group.divergences, differences, strict=True):
            target, logits = relation.target, relation.logits
            self._values[relation.part] += difference_rB.mul_(p[target]).sum() * relation.factor
            if logits in grads:
                weight = relation.weight * relation.factor
                grads[logits].add_(p[logits], alpha=weight).sub_(p[target], alpha=weight)

    def _diagonal(self, block_rB: Tensor, block: slice) -> Tensor:
        """A view of the elements where a row meets its own pair's column."""
        first = self._settings.first_row + block.start
        return block_rB[:, first : first + len(block_rB)].diagonal()

    def _add_fd(self) -> None:
        """`fd`, in blocks too, so that no difference of whole feature matrices is held."""
        inputs, settings = self._inputs, self._settings
        pairs = ((inputs.matched_image_rows, inputs.teacher_image_rows), (inputs.matched_text_rows, inputs.teacher_text_rows))
        for student_bD, teacher_bD in pairs:
            assert student_bD is not None
            assert teacher_bD is not None
            width = student_bD.shape[1]
            grad_bD = self._gradients.of(student_bD)
            mean = 1 / (settings.num_columns * width)
            for block in _blocks(settings.num_rows, max(1, settings.max_block_elements // width)):
                difference_rD = student_bD[block] - teacher_bD[block]
                self._values["fd"] += difference_rD.square().sum() * mean
                if grad_bD is not None:
                    grad_bD[block].add_(difference_rD, alpha=2 * mean * settings.weights["fd"])


def _blocks(num_rows: int, num_block_rows: int) -> Iterator[slice]:
    for start in range(0, num_rows, num_block_rows):
        yield slice(start, min(start + num_block_rows, num_rows))
