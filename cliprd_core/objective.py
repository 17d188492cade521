"""The training objective: weights, learned scales and projections, and the dict of terms.

What belongs here is which features meet which in what term; the equations are in ``cliprd_core.losses`` and their computation
in bounded memory is in ``cliprd_core.objective_blocks``. Sources: "CLIP-RD" (arXiv 2603.25383), "CLIP-KD" (arXiv 2307.12732).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cliprd_core.distributed import all_reduce_sum, gather_row_counts, rank, world_size
from cliprd_core.losses import compute_dtype, unit_rows
from cliprd_core.objective_blocks import blocked_objective
from cliprd_core.objective_features import GatherOnce, Side, StudentFeatures, TeacherFeatures, check_shapes, projected
from cliprd_core.objective_spec import ObjectiveSpec, ScaleMode, default_block_elements
from cliprd_core.objective_terms import PARTS, Inputs, Settings, TeacherScales

INITIAL_SCALE = math.log(1 / 0.07)
"""Start of the parameters of the cross, image and text scales. By default they are used as they are: the published numbers were
made so, not with its exponential."""

MAX_LOG_SCALE = math.log(100)
"""Where `scale_mode` is `exp`, the parameters are kept within 0 and this, as CLIP keeps its own."""


@dataclass(frozen=True)
class ObjectiveOutput:
    """What one step's objective came to. B is the number of pairs over all ranks.

    `terms` and `weighted` have an entry for each term whose weight is not 0: `task`, `fd`, `icl`, `hrd`, `vrd`, `xrd`, `soft`,
    `gd`, `afd`, `mfd`. With `vrd` come those of its parts `vrd_kl`, `vrd_ce_image`, `vrd_ce_text` whose weights are not 0. They add up
    to it, weighted or not: leave them out when adding terms up.
    """

    loss: Tensor
    """0-d, to be differentiated on every rank. It is this rank's share of the total times the number of ranks, so AVERAGING
    parameters' gradients over ranks, as DistributedDataParallel does, gives exactly the gradient of `total`. With one process
    its value is `total`; with several, only its mean over ranks is."""
    total: Tensor
    """0-d, detached: the weighted sum of all terms over the global batch, equal on all ranks."""
    terms: dict[str, Tensor]
    """0-d, detached, unweighted, over the global batch, equal on all ranks."""
    weighted: dict[str, Tensor]
    """`terms` times their weights; `vrd` the sum of its weighted parts."""


class Objective(nn.Module):
    """The weighted sum of the terms of CLIP-RD, for 1 to N processes, in memory linear in the batch.

    Parameters, each there only if an active term uses it, so that none is ever without a gradient:

    - ``cross_scale`` (σ_x: icl, xrd), ``image_scale`` and ``text_scale`` (σ_I, σ_T: vrd): 0-d, used as `scale_mode` says. With
      ``vrd_kl`` but without ``vrd_ce_text`` the text scale has a gradient of zero: it belongs to a target;
    - ``image_projection.weight`` and ``text_projection.weight`` (teacher_width, student_width), where the widths differ: they
      carry the student's raw features to the teacher's width for fd, gd, icl, vrd and xrd (the images' alone for mfd). `task`
      and the student's side of `hrd` always use the student's own features, those it is deployed with;
    - ``image_fusion`` and ``text_fusion`` (weights (student_width, student_width + teacher_width), biases) and ``fusion_scale`` (σ_f,
      used as `scale_mode` says): afd.

    They must be in the optimiser, in the data-parallel wrapper and in the checkpoint like the student's own.
    """

    def __init__(
        self,
        weights: ObjectiveSpec,
        *,
        student_width: int,
        teacher_width: int | None = None,
        teacher_logit_scale: float | None = None,
        normalise_teacher: Callable[[Tensor], Tensor] = unit_rows,
        max_block_elements: int | None = None,
    ) -> None:
        """
        Args:
            weights: the terms' weights.
            student_width: D of the student's features.
            teacher_width: D of the teacher's; needed by every term but `task`.
            teacher_logit_scale: σ_t, exponentiated; needed by hrd and gd, and by soft without a temperature.
            normalise_teacher: makes the rows that the terms meet of the teacher's features.
            max_block_elements: bound on the rows times columns of similarities computed at once; memory against speed. None: as
                `default_block_elements` says of device and batch.

        Raises:
            ValueError: a term is active without what it needs.
        """
        super().__init__()
        if weights.needs_teacher and teacher_width is None:
            raise ValueError("the objective has terms that need a teacher: give `teacher_width`, or set all weights but `task` to 0")
        for part, is_needed in (("hrd", weights.hrd), ("gd", weights.gd), ("soft", weights.soft and weights.soft_temperature is None)):
            if is_needed and teacher_logit_scale is None:
                raise ValueError(f"`{part}` compares with the teacher's own logits: give `teacher_logit_scale`, or set its weight to 0")
        if max_block_elements is not None and max_block_elements < 1:
            raise ValueError(f"`max_block_elements` must be at least 1, not {max_block_elements}")
        self.weights = weights
        self.student_width = student_width
        self.teacher_width = teacher_width
        self.teacher_logit_scale = teacher_logit_scale
        self.max_block_elements = max_block_elements
        self._normalise_teacher = normalise_teacher
        self.cross_scale = _scale() if weights.icl or weights.xrd else None
        self.image_scale = _scale() if self._uses("vrd_kl", "vrd_ce_image") else None
        self.text_scale = _scale() if self._uses("vrd_kl", "vrd_ce_text") else None
        self.fusion_scale = _scale() if weights.afd else None
        self.image_projection: nn.Linear | None = None
        self.text_projection: nn.Linear | None = None
        if teacher_width is not None and teacher_width != student_width:
            if self._uses("fd", "gd", "icl", "xrd", "vrd_kl", "vrd_ce_image") or weights.mfd:
                self.image_projection = nn.Linear(student_width, teacher_width, bias=False)
            if self._uses("fd", "gd", "icl", "xrd", "vrd_kl", "vrd_ce_text"):
                self.text_projection = nn.Linear(student_width, teacher_width, bias=False)

        self.image_fusion: nn.Linear | None = None
        self.text_fusion: nn.Linear | None = None
        if teacher_width is not None and weights.afd:
            self.image_fusion = nn.Linear(student_width + teacher_width, student_width)
            self.text_fusion = nn.Linear(student_width + teacher_width, student_width)

    def _uses(self, *parts: str) -> bool:
        """Whether one of `parts` is active."""
        weights = self.weights.part_weights
        return any(weights[part] for part in parts)

    def _parameters_of_scales(self) -> dict[str, nn.Parameter]:
        named = {"cross_scale": self.cross_scale, "image_scale": self.image_scale, "text_scale": self.text_scale}
        named["fusion_scale"] = self.fusion_scale
        return {name: parameter for name, parameter in named.items() if parameter is not None}

    def scales(self) -> dict[str, Tensor]:
        """The learned scales that active terms use, as factors of logits, 0-d and detached, for diagnostics."""
        return {name: self._factor(parameter).detach() for name, parameter in self._parameters_of_scales().items()}

    def _factor(self, parameter: Tensor) -> Tensor:
        return parameter if self.weights.scale_mode is ScaleMode.RAW else parameter.exp()

    @torch.no_grad()
    def clamp_scales(self) -> None:
        """To be called after each step, as CLIP clamps its own, so that metrics and checkpoints hold what the next step uses."""
        if self.weights.scale_mode is ScaleMode.EXP:
            for parameter in self._parameters_of_scales().values():
                parameter.clamp_(0.0, MAX_LOG_SCALE)

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
        """Compute the objective of the global batch. A collective: every rank must call it, with its own pairs.

        Everything is computed in float32 (float64 if any features are), also under autocast, which is switched off here:
        logits of up to 100 have errors of 0.4 in bfloat16. TF32, which torch does not use by default, has 0.05; the trainer switches it
        off (`precision.use_exact_products`). The result can be differentiated once.

        Args:
            student_image_features: (b, student_width), not normalised, any floating type; b may differ between ranks.
            student_text_features: (b, student_width), likewise.
            student_logit_scale: σ_s, one element, already exponentiated.
            teacher_image_features: (b, teacher_width), normalised or not; they never get a gradient.
            teacher_text_features: (b, teacher_width), likewise.
            student_masked_image_features: (b, student_width), of the masked images; needed by mfd.
            row_counts: every rank's b, by rank, where the caller knows them; they must be true on every rank. None: the ranks ask each
                other, for which a GPU's queue has to run empty first.

        Raises:
            ValueError: a shape is not as above, or the teacher's features are missing.
        """
        student = StudentFeatures(student_image_features, student_text_features, student_logit_scale, student_masked_image_features)
        return combined_objective([self], student, [TeacherFeatures(teacher_image_features, teacher_text_features)], row_counts)

    def sides(self, student: StudentFeatures, own: tuple[Tensor, Tensor], teacher: TeacherFeatures) -> tuple[Side, Side]:
        """Images' and texts' features as the terms of this objective's teacher meet them. `own` are the student's, normalised."""
        given = ((student.image, teacher.image, self.image_projection), (student.text, teacher.text, self.text_projection))
        sides = []
        for (student_bD, teacher_bD, projection), own_bD in zip(given, own, strict=True):
            matched_bD = own_bD if projection is None else projected(student_bD, projection, own_bD.dtype)
            sides.append(
                Side(own_bD, matched_bD, None if teacher_bD is None else self._normalise_teacher(teacher_bD.detach().to(own_bD.dtype)))
            )
        return sides[0], sides[1]

    def inputs(self, images: Side, texts: Side, student_logit_scale: Tensor, gather: GatherOnce) -> Inputs:
        """What active terms meet, with all that they need of the other ranks."""
        horizontal = self._uses("task", "hrd", "soft")
        fused_text = texts.fused(self.text_fusion)
        return Inputs(
            student_logit_scale=student_logit_scale if self.weights.uses_student_logit_scale else None,
            **{name: self._factor(parameter.to(images.own.dtype)) for name, parameter in self._parameters_of_scales().items()},
            student_image_rows=images.own if horizontal else None,
            student_text=gather.of(texts.own) if horizontal else None,
            matched_image_rows=images.matched if self._uses("fd", "gd") else None,
            matched_text_rows=texts.matched if self._uses("fd", "gd") else None,
            matched_image=gather.of(images.matched) if self._uses("icl", "xrd", "vrd_kl", "vrd_ce_image") else None,
            matched_text=gather.of(texts.matched) if self._uses("gd", "icl", "xrd", "vrd_kl", "vrd_ce_text") else None,
            teacher_image_rows=images.teacher,
            teacher_text_rows=texts.teacher,
            teacher_text=gather.of(texts.teacher) if self._uses("hrd", "soft", "gd") and texts.teacher is not None else None,
            fused_image_rows=images.fused(self.image_fusion),
            fused_text=None if fused_text is None else gather.of(fused_text),
        )

    def teacher_scales(self) -> TeacherScales:
        soft_temperature = self.weights.soft_temperature
        return TeacherScales(self.teacher_logit_scale, self.teacher_logit_scale if soft_temperature is None else 1 / soft_temperature)

    def mfd(self, masked_bD: Tensor | None, teacher_bD: Tensor | None, num_pairs: int) -> Tensor:
        """0-d: this rank's share of `losses.mfd` over the global batch of `num_pairs`."""
        if masked_bD is None:
            raise ValueError("`student_masked_image_features` is missing, but the weight `mfd` is above 0")
        assert teacher_bD is not None
        check_shapes({"student_masked_image_features": masked_bD}, len(teacher_bD), self.student_width)
        projection, dtype = self.image_projection, teacher_bD.dtype
        matched_bD = unit_rows(masked_bD.to(dtype)) if projection is None else projected(masked_bD, projection, dtype)
        return F.mse_loss(matched_bD, teacher_bD, reduction="sum") / (num_pairs * teacher_bD.shape[1])


def combined_objective(
    members: Sequence[Objective], student: StudentFeatures, teachers: Sequence[TeacherFeatures], row_counts: list[int] | None
) -> ObjectiveOutput:
    """`task`, and the mean of each other term over `members`, one per teacher, alike but for teacher, projections and learned scales.

    What members have in common is computed and gathered once. Otherwise as :meth:`Objective.forward`.
    """
    first = members[0]
    student.check(first.student_width)
    features = [student.image, student.text]
    if first.weights.needs_teacher:
        for member, teacher in zip(members, teachers, strict=True):
            assert member.teacher_width is not None
            named = {"teacher_image_features": teacher.image, "teacher_text_features": teacher.text}
            check_shapes(named, len(student.image), member.teacher_width)
            features += [tensor for tensor in named.values() if tensor is not None]
    else:
        teachers = [TeacherFeatures(None, None)]
    dtype = compute_dtype(*features)
    with torch.autocast(student.image.device.type, enabled=False):
        row_counts = gather_row_counts(len(student.image)) if row_counts is None else row_counts
        assert row_counts[rank()] == len(student.image), "row_counts do not belong to the features"
        own = (unit_rows(student.image.to(dtype)), unit_rows(student.text.to(dtype)))
        student_logit_scale, gather = student.logit_scale.reshape(()).to(dtype), GatherOnce(row_counts)
        sides = [member.sides(student, own, teacher) for member, teacher in zip(members, teachers, strict=True)]
        inputs = [member.inputs(*both, student_logit_scale, gather) for member, both in zip(members, sides, strict=True)]
        share, values = blocked_objective(_settings(members, row_counts, student.image.device), inputs)
        if first.weights.mfd:
            pairs = zip(members, sides, strict=True)
            mfd = torch.stack([member.mfd(student.masked_image, images.teacher, sum(row_counts)) for member, (images, _) in pairs]).mean()
            share, values = share + first.weights.mfd * mfd, torch.cat([values, mfd.detach().to(values.dtype).reshape(1)])
        return _output(first.weights, share * world_size(), all_reduce_sum(values))


def _settings(members: Sequence[Objective], row_counts: list[int], device: torch.device) -> Settings:
    max_block_elements = members[0].max_block_elements
    if max_block_elements is None:
        max_block_elements = default_block_elements(sum(row_counts), on_gpu=device.type == "cuda")
    return Settings(
        weights=members[0].weights.part_weights,
        teachers=tuple(member.teacher_scales() for member in members),
        first_row=sum(row_counts[: rank()]),
        num_rows=row_counts[rank()],
        num_columns=sum(row_counts),
        max_block_elements=max_block_elements,
    )


def _output(spec: ObjectiveSpec, loss: Tensor, values: Tensor) -> ObjectiveOutput:
    weights = {**spec.part_weights, "mfd": spec.mfd}
    parts = (*PARTS, "mfd") if spec.mfd else PARTS
    terms = {part: value for part, value in zip(parts, values, strict=True) if weights[part]}
    weighted = {part: value * weights[part] for part, value in terms.items()}
    total = torch.stack(list(weighted.values())).sum()
    if vertical := [part for part in terms if part.startswith("vrd_")]:
        terms["vrd"] = torch.stack([terms[part] for part in vertical]).sum()
        weighted["vrd"] = torch.stack([weighted[part] for part in vertical]).sum()
    return ObjectiveOutput(loss, total, terms, weighted)


def _scale() -> nn.Parameter:
    return nn.Parameter(torch.tensor(INITIAL_SCALE))
