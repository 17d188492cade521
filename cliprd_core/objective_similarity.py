"""One similarity matrix of the objective, a block of rows at a time, and the buffers its gradients are added up in.

Shapes: b pairs on this rank, B on all, r in a block, D the width of the features.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

_SMALLEST_SCALE = 1e-12
"""A scale nearer to zero is computed as this: softmaxes are the same to 1e-12, and its gradient may divide by it."""


class Gradients:
    """One zeroed buffer per tensor that needs a gradient; a tensor given twice has one buffer, returned for its first place."""

    def __init__(self, tensors: tuple[Tensor | None, ...], needed: tuple[bool, ...]) -> None:
        self._tensors = tensors
        self._buffers: dict[int, Tensor] = {}
        for tensor, is_needed in zip(tensors, needed, strict=True):
            if tensor is not None and is_needed:
                self._buffers[id(tensor)] = torch.zeros_like(tensor, memory_format=torch.contiguous_format)

    def of(self, tensor: Tensor) -> Tensor | None:
        return self._buffers.get(id(tensor))

    def multiply_(self, factor: float) -> None:
        for buffer in self._buffers.values():
            buffer.mul_(factor)

    def in_order(self) -> list[Tensor | None]:
        remaining = dict(self._buffers)
        return [None if tensor is None else remaining.pop(id(tensor), None) for tensor in self._tensors]


class Similarity:
    """Logits ``scale · rows @ columnsᵀ`` of this rank's rows against all columns, block by block."""

    def __init__(self, rows_bD: Tensor, columns_BD: Tensor, scale: Tensor, gradients: Gradients) -> None:
        self.rows_bD, self.columns_BD = rows_bD, columns_BD
        smallest = torch.full_like(scale, _SMALLEST_SCALE).copysign(scale)
        self._scale = torch.where(scale.abs() < _SMALLEST_SCALE, smallest, scale)
        self._grad_rows_bD, self._grad_columns_BD = gradients.of(rows_bD), gradients.of(columns_BD)
        self._grad_scale = gradients.of(scale)
        self._only_block: Tensor | None = None
        # Over all ranks' rows, set between the passes. Apart, since their sum rounds away what a confident pair's softmax leaves to others.
        self.column_max_B: Tensor
        self.column_log_sum_B: Tensor  # of exponentials over that of the largest

    @property
    def scale(self) -> Tensor:
        return self._scale

    @property
    def needs_gradient(self) -> bool:
        return any(grad is not None for grad in (self._grad_rows_bD, self._grad_columns_BD, self._grad_scale))

    def logits(self, block: slice) -> Tensor:
        """(r, B)."""
        if self._only_block is not None:
            return self._only_block
        return (self.rows_bD[block] * self._scale) @ self.columns_BD.T

    def local_column_sums(self, blocks: list[slice], *, keeps_block: bool) -> tuple[Tensor, Tensor]:
        """Over this rank's rows: the largest logit of each column, and its sum of exponentials over that of the largest; (B,) each.

        `keeps_block`: the logits, of one block, are kept for the next pass.
        """
        largest_B = self.columns_BD.new_full((len(self.columns_BD),), -torch.inf)
        total_B = torch.zeros_like(largest_B)
        for block in blocks:
            logits_rB = self.logits(block)
            before_B, largest_B = largest_B, torch.maximum(largest_B, logits_rB.amax(dim=0))
            total_B = total_B * (before_B - largest_B).exp_() + (logits_rB - largest_B).exp_().sum(dim=0)
            if keeps_block:
                self._only_block = logits_rB
        return largest_B, total_B

    def column_log_softmax(self, logits_rB: Tensor) -> Tensor:
        """Logarithms of the columns' softmaxes, (r, B), of a block of the logits."""
        return (logits_rB - self.column_max_B).sub_(self.column_log_sum_B)

    def add_gradient(self, block: slice, grad_rB: Tensor, logits_rB: Tensor) -> None:
        """Add what flows from the gradient of a block's logits into both sides and the scale."""
        if self._grad_rows_bD is not None:
            self._grad_rows_bD[block] += (grad_rB @ self.columns_BD) * self._scale
        if self._grad_columns_BD is not None:
            self._grad_columns_BD.addmm_(grad_rB.T, self.rows_bD[block] * self._scale)
        if self._grad_scale is not None:  # not torch.dot: it adds up in sequence, with 100 times the error
            self.add_scale_gradient((grad_rB * logits_rB).sum() / self._scale)

    def add_scale_gradient(self, grad: Tensor) -> None:
        """Add what flows into the scale, 0-d, if it has a gradient."""
        if self._grad_scale is not None:
            self._grad_scale += grad


class Similarities:
    """Those of one pass, each made once, whichever terms ask for it."""

    def __init__(self, gradients: Gradients) -> None:
        self._gradients = gradients
        self._made: dict[tuple[int, int, float], Similarity] = {}  # tensors live as long as this, so their ids are theirs

    def of(self, rows_bD: Tensor | None, columns_BD: Tensor | None, scale: Tensor | float | None) -> Similarity:
        """``scale · rows @ columnsᵀ``; `scale` 0-d if learned, a number if frozen. What an active term uses is never None."""
        assert rows_bD is not None
        assert columns_BD is not None
        assert scale is not None
        key = (id(rows_bD), id(columns_BD), id(scale) if isinstance(scale, Tensor) else float(scale))
        if key not in self._made:
            factor = scale if isinstance(scale, Tensor) else columns_BD.new_full((), scale)
            self._made[key] = Similarity(rows_bD, columns_BD, factor, self._gradients)
        return self._made[key]

    def __iter__(self) -> Iterator[Similarity]:
        return iter(self._made.values())
