"""Which similarity matrices the objective has, and which terms rest on them.

What belongs here is the translation of the equations (``cliprd_core.losses``) into what ``cliprd_core.objective_blocks`` computes:
every term but `fd` and `gd` is a cross-entropy or a divergence over the rows and the columns of similarity matrices, (B, B) each.

    S   = σ_s s_I s_Tᵀ   student, horizontal        T   = σ_t t_I t_Tᵀ   teacher, horizontal
    A   = σ_x t_I s_Tᵀ   cross                      C   = σ_x t_T s_Iᵀ   cross
    V_I = σ_I t_I s_Iᵀ   vertical, image            V_T = σ_T t_T s_Tᵀ   vertical, text

and, for `soft` with a temperature of its own, a second T; for `afd`, F = σ_f f_I f_Tᵀ of fused features f.

Each rank holds the rows of its own pairs against all columns. Rows are the teacher's wherever a teacher is, so that only the
student's features have to be gathered, and the teacher's texts for T.

Shapes: b pairs on this rank, B on all, r in a block, D the width of the features.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from cliprd_core.objective_spec import ObjectiveSpec

PARTS = tuple(ObjectiveSpec().part_weights)
"""The terms, with vrd's three apart, in the order of :func:`blocked_objective`'s values."""

_SMALLEST_SCALE = 1e-12
"""A scale nearer to zero is computed as this: softmaxes are the same to 1e-12, and its gradient may divide by it."""


class Inputs(NamedTuple):
    """Scales (0-d) and normalised features; None where no active term uses one.

    `…_rows` are this rank's (b, D), the others all ranks' (B, D). `student_…` have the student's own width. `matched_…` are the
    student's in the teacher's width, and are the very same tensors where the widths are equal.
    """

    student_logit_scale: Tensor | None = None
    cross_scale: Tensor | None = None
    image_scale: Tensor | None = None
    text_scale: Tensor | None = None
    fusion_scale: Tensor | None = None
    student_image_rows: Tensor | None = None
    student_text: Tensor | None = None
    matched_image_rows: Tensor | None = None
    matched_text_rows: Tensor | None = None
    matched_image: Tensor | None = None
    matched_text: Tensor | None = None
    teacher_image_rows: Tensor | None = None
    teacher_text_rows: Tensor | None = None
    teacher_text: Tensor | None = None
    fused_image_rows: Tensor | None = None
    fused_text: Tensor | None = None


@dataclass(frozen=True)
class Settings:
    """What is to be computed, beside the tensors."""

    weights: dict[str, float]  # of each of PARTS
    teacher_logit_scale: float | None
    soft_scale: float | None  # factor of soft's teacher logits
    first_row: int  # position of this rank's first pair in the global batch
    num_rows: int  # b
    num_columns: int  # B
    max_block_elements: int


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
        self.column_logsumexp_B: Tensor  # over all ranks' rows; set between the passes

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

    def local_column_logsumexp(self, blocks: list[slice]) -> Tensor:
        """(B,), over this rank's rows."""
        total_B = self.columns_BD.new_full((len(self.columns_BD),), -torch.inf)
        for block in blocks:
            logits_rB = self.logits(block)
            total_B = torch.logaddexp(total_B, logits_rB.logsumexp(dim=0))
            if len(blocks) == 1:
                self._only_block = logits_rB
        return total_B

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


@dataclass(frozen=True)
class CrossEntropy:
    """½[CE(Z) + CE(Zᵀ)], or ½CE(Zᵀ) alone."""

    part: str
    logits: Similarity
    weight: float
    columns_only: bool = False


@dataclass(frozen=True)
class Divergence:
    """`factor` · ½[KL(target ‖ logits) + KL(targetᵀ ‖ logitsᵀ)], or the same with the cross-entropy H(P, Q) for KL(P ‖ Q)."""

    part: str
    target: Similarity
    logits: Similarity
    weight: float
    factor: float = 1.0
    with_entropy: bool = False  # cross-entropy: the target has no gradient, so its entropy adds to the value alone


@dataclass(frozen=True)
class Group:
    """Similarities that share terms, and so are computed side by side."""

    similarities: tuple[Similarity, ...]
    cross_entropies: tuple[CrossEntropy, ...]
    divergences: tuple[Divergence, ...]


def _horizontal(settings: Settings, inputs: Inputs, made: Similarities) -> Group:
    """`task`, `hrd` and `soft`, on S and T."""
    weights = settings.weights
    student = made.of(inputs.student_image_rows, inputs.student_text, inputs.student_logit_scale)
    contrast = (CrossEntropy("task", student, weights["task"]),) if weights["task"] else ()
    relations = []
    for part, factor in (("hrd", settings.teacher_logit_scale), ("soft", settings.soft_scale)):
        if weights[part]:
            teacher = made.of(inputs.teacher_image_rows, inputs.teacher_text, factor)
            relations.append(Divergence(part, teacher, student, weights[part], with_entropy=part == "soft"))
    teachers = dict.fromkeys(relation.target for relation in relations)
    return Group((student, *teachers), contrast, tuple(relations))


def _cross(settings: Settings, inputs: Inputs, made: Similarities) -> Group:
    """`icl` and `xrd`, on A and C. The rows of icl's σ_x s_I t_Tᵀ are the columns of C, those of its σ_x s_T t_Iᵀ the columns of A."""
    icl, xrd = settings.weights["icl"], settings.weights["xrd"]
    a = made.of(inputs.teacher_image_rows, inputs.matched_text, inputs.cross_scale)
    c = made.of(inputs.teacher_text_rows, inputs.matched_image, inputs.cross_scale)
    contrast = tuple(CrossEntropy("icl", one, icl, columns_only=True) for one in (a, c)) if icl else ()
    relation = (Divergence("xrd", c, a, xrd, factor=0.5), Divergence("xrd", a, c, xrd, factor=0.5))
    return Group((a, c), contrast, relation if xrd else ())


def _vertical(settings: Settings, inputs: Inputs, made: Similarities) -> Group:
    """vrd's parts, on V_I and V_T."""
    kl, ce_image, ce_text = (settings.weights[part] for part in ("vrd_kl", "vrd_ce_image", "vrd_ce_text"))
    similarities, contrast = [], []
    if kl or ce_image:
        image = made.of(inputs.teacher_image_rows, inputs.matched_image, inputs.image_scale)
        similarities.append(image)
        contrast += [CrossEntropy("vrd_ce_image", image, ce_image)] if ce_image else []
    if kl or ce_text:
        text = made.of(inputs.teacher_text_rows, inputs.matched_text, inputs.text_scale)
        similarities.append(text)
        contrast += [CrossEntropy("vrd_ce_text", text, ce_text)] if ce_text else []
    relation = (Divergence("vrd_kl", text, image, kl),) if kl else ()
    return Group(tuple(similarities), tuple(contrast), relation)


def _fused(settings: Settings, inputs: Inputs, made: Similarities) -> Group:
    """`afd`, on F."""
    fused = made.of(inputs.fused_image_rows, inputs.fused_text, inputs.fusion_scale)
    return Group((fused,), (CrossEntropy("afd", fused, settings.weights["afd"]),), ())


_GROUPS = {
    _horizontal: ("task", "hrd", "soft"),
    _cross: ("icl", "xrd"),
    _vertical: ("vrd_kl", "vrd_ce_image", "vrd_ce_text"),
    _fused: ("afd",),
}


def active_groups(settings: Settings, inputs: Inputs, made: Similarities) -> list[Group]:
    """The similarities and terms whose weights are not 0."""
    wanted = [build for build, parts in _GROUPS.items() if any(settings.weights[part] for part in parts)]
    return [build(settings, inputs, made) for build in wanted]


def contrasts(settings: Settings, inputs: Inputs, made: Similarities) -> tuple[Similarity, Similarity]:
    """`gd`'s, student's and teacher's: S in the teacher's width, which is S itself where the widths are equal, and T."""
    student = made.of(inputs.matched_image_rows, inputs.matched_text, inputs.student_logit_scale)
    return student, made.of(inputs.teacher_image_rows, inputs.teacher_text, settings.teacher_logit_scale)
