"""The objective's arithmetic in bounded memory: every term's value and gradient, a block of rows at a time.

Dense, the objective needs a dozen (B, B) matrices. Here no more than a few blocks of `max_block_elements` exist at once, and
the result is the same to rounding. What belongs here is that computation on normalised features; which features, weights and
scales there are is ``cliprd_core.objective``'s business, and which terms follow from them ``cliprd_core.objective_terms``'s.

Each rank holds the rows of its own pairs against all columns. Two passes over its blocks:

1. every column's largest logit and sum of exponentials, over all ranks (a row lies on one rank and needs no such pass);
2. each block again: its softmaxes over rows and over columns, the terms' values, and at once the gradients.

The gradients are thus made in the forward pass and only scaled in the backward pass, so that no block is ever computed a third
time and nothing of size (B, B) is kept. A (B, B) similarity costs one matrix product per pass, and one for each side that has a
gradient: 18 for the whole objective, against 22 in the plain dense form.

Shapes: b pairs on this rank, B on all, r in a block, D the width of the features.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from cliprd_core.distributed import all_reduce_exp_sum
from cliprd_core.objective_gradients import add_gradient_distillation
from cliprd_core.objective_similarity import Gradients, Similarities, Similarity
from cliprd_core.objective_spec import MAX_KEPT_BLOCKS
from cliprd_core.objective_terms import PARTS, Group, Inputs, Settings, Turn, active_groups, contrasts


def blocked_objective(settings: Settings, teachers: Sequence[Inputs]) -> tuple[Tensor, Tensor]:
    """This rank's share of the objective. A collective: every rank must call it.

    Args:
        settings: what is to be computed.
        teachers: what the terms of each teacher meet; one without a teacher's features where there is no teacher.

    Returns:
        share: 0-d, differentiable once with respect to the student's features and the scales. The sum of the shares of all
            ranks is the weighted total of the global batch, and the sum over ranks of their gradients is its gradient.
        values: (len(PARTS),) float64, detached: this rank's share of each unweighted term, 0 where its weight is 0.
    """
    share, values = _BlockedObjective.apply(settings, *itertools.chain.from_iterable(teachers))
    return share, values


class _BlockedObjective(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, settings: Settings, *tensors: Tensor | None) -> tuple[Tensor, Tensor]:
        gradients = Gradients(tensors, ctx.needs_input_grad[1:])
        num_inputs = len(Inputs._fields)
        teachers = [Inputs(*tensors[first : first + num_inputs]) for first in range(0, len(tensors), num_inputs)]
        values = _Pass(settings, teachers, gradients).run()
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

    def __init__(self, settings: Settings, teachers: Sequence[Inputs], gradients: Gradients) -> None:
        self._settings, self._teachers, self._gradients = settings, teachers, gradients
        device = next(tensor.device for tensor in reversed(teachers[0]) if tensor is not None)
        self._values = {part: torch.zeros((), dtype=torch.float64, device=device) for part in PARTS}

    def run(self) -> dict[str, Tensor]:
        settings = self._settings
        similarities = Similarities(self._gradients)
        groups = active_groups(settings, self._teachers, similarities)
        pairs = contrasts(settings, self._teachers, similarities) if settings.weights["gd"] else []
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
            for inputs in self._teachers:
                self._add_fd(inputs)
        for student, teacher in pairs:
            self._values["gd"] += add_gradient_distillation(settings, student, teacher, self._gradients, blocks)
        return self._values

    def _sum_columns(self, similarities: list[Similarity], blocks: list[slice]) -> None:
        """The first pass."""
        if not similarities:
            return
        num_elements = len(similarities) * self._settings.num_rows * self._settings.num_columns
        keeps_block = len(blocks) == 1 and num_elements <= MAX_KEPT_BLOCKS * self._settings.max_block_elements
        local = [similarity.local_column_sums(blocks, keeps_block=keeps_block) for similarity in similarities]
        largest_SB, total_SB = all_reduce_exp_sum(*(torch.stack(one) for one in zip(*local, strict=True)))
        for similarity, largest_B, log_sum_B in zip(similarities, largest_SB, total_SB.log_(), strict=True):
            similarity.column_max_B, similarity.column_log_sum_B = largest_B, log_sum_B

    def _add_block(self, group: Group, block: slice) -> None:
        """The second pass over one block."""
        logits = {similarity: similarity.logits(block) for similarity in group.learning}
        grads = {similarity: torch.zeros_like(logits[similarity]) for similarity in logits if similarity.needs_gradient}
        for turn in group.turns:
            self._add_turn(turn, block, logits, grads)
        for similarity, grad_rB in grads.items():
            similarity.add_gradient(block, grad_rB, logits[similarity])

    def _add_turn(self, turn: Turn, block: slice, learning: dict[Similarity, Tensor], grads: dict[Similarity, Tensor]) -> None:
        """`learning` are the logits, and `grads` what is added up for their gradients."""
        logits = {one: learning[one] for one in turn.learning}
        logits |= {one: learning[one] if one in learning else one.logits(block) for one in turn.targets}
        if turn.divergences or not all(term.columns_only for term in turn.cross_entropies):
            self._add_softmaxes(turn, block, {one: logits[one].log_softmax(dim=1) for one in logits}, grads, is_columns=False)
        self._add_softmaxes(turn, block, {one: one.column_log_softmax(logits[one]) for one in logits}, grads, is_columns=True)

    def _add_softmaxes(
        self, turn: Turn, block: slice, log_p: dict[Similarity, Tensor], grads: dict[Similarity, Tensor], *, is_columns: bool
    ) -> None:
        """Values, and gradients of the logits, of a turn's terms in one direction: softmaxes over rows, or over columns.

        `log_p` are the softmaxes' logarithms, (r, B) each; they are overwritten.
        """
        cross_entropies = [term for term in turn.cross_entropies if is_columns or not term.columns_only]
        for term in cross_entropies:
            self._values[term.part] -= self._diagonal(log_p[term.logits], block).sum() * term.factor
        differences = [
            -log_p[relation.logits] if relation.with_entropy else log_p[relation.target] - log_p[relation.logits]
            for relation in turn.divergences
        ]
        p = {similarity: log_p_rB.exp_() for similarity, log_p_rB in log_p.items()}  # in place: one block less, and log_p is done with
        for term in cross_entropies:
            if term.logits in grads:
                weight = term.weight * term.factor
                grads[term.logits].add_(p[term.logits], alpha=weight)
                self._diagonal(grads[term.logits], block).sub_(weight)
        for relation, difference_rB in zip(turn.divergences, differences, strict=True):
            target, logits = relation.target, relation.logits
            self._values[relation.part] += difference_rB.mul_(p[target]).sum() * relation.factor
            if logits in grads:
                weight = relation.weight * relation.factor
                grads[logits].add_(p[logits], alpha=weight).sub_(p[target], alpha=weight)

    def _diagonal(self, block_rB: Tensor, block: slice) -> Tensor:
        """A view of the elements where a row meets its own pair's column."""
        first = self._settings.first_row + block.start
        return block_rB[:, first : first + len(block_rB)].diagonal()

    def _add_fd(self, inputs: Inputs) -> None:
        """`fd`, in blocks too, so that no difference of whole feature matrices is held."""
        settings = self._settings
        pairs = ((inputs.matched_image_rows, inputs.teacher_image_rows), (inputs.matched_text_rows, inputs.teacher_text_rows))
        for student_bD, teacher_bD in pairs:
            assert student_bD is not None
            assert teacher_bD is not None
            width = student_bD.shape[1]
            grad_bD = self._gradients.of(student_bD)
            mean = settings.teacher_share / (settings.num_columns * width)
            for block in _blocks(settings.num_rows, max(1, settings.max_block_elements // width)):
                difference_rD = student_bD[block] - teacher_bD[block]
                self._values["fd"] += difference_rD.square().sum() * mean
                if grad_bD is not None:
                    grad_bD[block].add_(difference_rD, alpha=2 * mean * settings.weights["fd"])


def _blocks(num_rows: int, num_block_rows: int) -> Iterator[slice]:
    for start in range(0, num_rows, num_block_rows):
        yield slice(start, min(start + num_block_rows, num_rows))
