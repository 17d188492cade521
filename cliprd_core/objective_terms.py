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

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from cliprd_core.objective_similarity import Similarities, Similarity
from cliprd_core.objective_spec import ObjectiveSpec

PARTS = tuple(ObjectiveSpec().part_weights)
"""The terms, with vrd's three apart, in the order of :func:`blocked_objective`'s values."""


class Inputs(NamedTuple):
    """Scales (0-d) and normalised features that one teacher's terms meet; None where no active term uses one.

    `…_rows` are this rank's (b, D), the others all ranks' (B, D). `student_…` have the student's own width. `matched_…` are the
    student's in the teacher's width, and are the very same tensors where the widths are equal. What several teachers' inputs have in
    common is the very same tensor in each; nothing of it is computed twice.
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
class TeacherScales:
    """One teacher's frozen factors of logits; None where no active term uses one."""

    logit: float | None
    soft: float | None  # of `soft`


@dataclass(frozen=True)
class Settings:
    """What is to be computed, beside the tensors."""

    weights: dict[str, float]  # of each of PARTS
    teachers: tuple[TeacherScales, ...]  # one where there is no teacher, too
    first_row: int  # position of this rank's first pair in the global batch
    num_rows: int  # b
    num_columns: int  # B
    max_block_elements: int

    @property
    def teacher_share(self) -> float:
        """A distillation term is the mean of that term over the teachers: the factor of each one's."""
        return 1 / len(self.teachers)


@dataclass(frozen=True)
class CrossEntropy:
    """`factor` · ½[CE(Z) + CE(Zᵀ)], or `factor` · ½CE(Zᵀ) alone."""

    part: str
    logits: Similarity
    weight: float
    factor: float
    columns_only: bool = False


@dataclass(frozen=True)
class Divergence:
    """`factor` · ½[KL(target ‖ logits) + KL(targetᵀ ‖ logitsᵀ)], or the same with the cross-entropy H(P, Q) for KL(P ‖ Q)."""

    part: str
    target: Similarity
    logits: Similarity
    weight: float
    factor: float
    with_entropy: bool = False  # cross-entropy: the target has no gradient, so its entropy adds to the value alone


@dataclass(frozen=True)
class Turn:
    """Terms that are computed at once."""

    cross_entropies: tuple[CrossEntropy, ...]
    divergences: tuple[Divergence, ...]

    @property
    def learning(self) -> list[Similarity]:
        """Those that have a gradient of these terms."""
        terms: tuple[CrossEntropy | Divergence, ...] = (*self.cross_entropies, *self.divergences)
        return list(dict.fromkeys(term.logits for term in terms))

    @property
    def targets(self) -> list[Similarity]:
        return list(dict.fromkeys(relation.target for relation in self.divergences))


@dataclass(frozen=True)
class Group:
    """Turns that share similarities with a gradient. These are kept in all turns; of the targets, only those of one turn."""

    turns: tuple[Turn, ...]

    @property
    def learning(self) -> list[Similarity]:
        return list(dict.fromkeys(similarity for turn in self.turns for similarity in turn.learning))


def _horizontal(settings: Settings, teachers: Sequence[Inputs], made: Similarities) -> Group:
    """`task`, `hrd` and `soft`, on S and every teacher's T, which take turns."""
    weights, share = settings.weights, settings.teacher_share
    student = made.of(teachers[0].student_image_rows, teachers[0].student_text, teachers[0].student_logit_scale)
    relations = []
    for inputs, scales in zip(teachers, settings.teachers, strict=True):
        for part, factor in (("hrd", scales.logit), ("soft", scales.soft)):
            if weights[part]:
                target = made.of(inputs.teacher_image_rows, inputs.teacher_text, factor)
                relations.append(Divergence(part, target, student, weights[part], share, with_entropy=part == "soft"))
    targets = dict.fromkeys(relation.target for relation in relations)
    of_targets = [tuple(relation for relation in relations if relation.target is target) for target in targets] or [()]
    contrast = (CrossEntropy("task", student, weights["task"], 1.0),) if weights["task"] else ()
    return Group((Turn(contrast, of_targets[0]), *(Turn((), of_target) for of_target in of_targets[1:])))


def _cross(settings: Settings, inputs: Inputs, made: Similarities) -> Group:
    """`icl` and `xrd`, on A and C. The rows of icl's σ_x s_I t_Tᵀ are the columns of C, those of its σ_x s_T t_Iᵀ the columns of A."""
    icl, xrd, share = settings.weights["icl"], settings.weights["xrd"], settings.teacher_share
    a = made.of(inputs.teacher_image_rows, inputs.matched_text, inputs.cross_scale)
    c = made.of(inputs.teacher_text_rows, inputs.matched_image, inputs.cross_scale)
    contrast = tuple(CrossEntropy("icl", one, icl, share, columns_only=True) for one in (a, c)) if icl else ()
    relation = (Divergence("xrd", c, a, xrd, share / 2), Divergence("xrd", a, c, xrd, share / 2)) if xrd else ()
    return Group((Turn(contrast, relation),))


def _vertical(settings: Settings, inputs: Inputs, made: Similarities) -> Group:
    """vrd's parts, on V_I and V_T."""
    kl, ce_image, ce_text = (settings.weights[part] for part in ("vrd_kl", "vrd_ce_image", "vrd_ce_text"))
    share, contrast = settings.teacher_share, []
    if kl or ce_image:
        image = made.of(inputs.teacher_image_rows, inputs.matched_image, inputs.image_scale)
        contrast += [CrossEntropy("vrd_ce_image", image, ce_image, share)] if ce_image else []
    if kl or ce_text:
        text = made.of(inputs.teacher_text_rows, inputs.matched_text, inputs.text_scale)
        contrast += [CrossEntropy("vrd_ce_text", text, ce_text, share)] if ce_text else []
    return Group((Turn(tuple(contrast), (Divergence("vrd_kl", text, image, kl, share),) if kl else ()),))


def _fused(settings: Settings, inputs: Inputs, made: Similarities) -> Group:
    """`afd`, on F."""
    fused = made.of(inputs.fused_image_rows, inputs.fused_text, inputs.fusion_scale)
    return Group((Turn((CrossEntropy("afd", fused, settings.weights["afd"], settings.teacher_share),), ()),))


_GROUPS_OF_ONE_TEACHER = {
    _cross: ("icl", "xrd"),
    _vertical: ("vrd_kl", "vrd_ce_image", "vrd_ce_text"),
    _fused: ("afd",),
}


def active_groups(settings: Settings, teachers: Sequence[Inputs], made: Similarities) -> list[Group]:
    """The terms whose weights are not 0, on their similarities."""

    def uses(parts: tuple[str, ...]) -> bool:
        return any(settings.weights[part] for part in parts)

    shared = [_horizontal(settings, teachers, made)] if uses(("task", "hrd", "soft")) else []
    wanted = [build for build, parts in _GROUPS_OF_ONE_TEACHER.items() if uses(parts)]
    return shared + [build(settings, inputs, made) for inputs in teachers for build in wanted]


def contrasts(settings: Settings, teachers: Sequence[Inputs], made: Similarities) -> list[tuple[Similarity, Similarity]]:
    """`gd`'s, student's and teacher's for each teacher: S in the teacher's width, which is S itself where the widths are equal, and T."""
    return [
        (
            made.of(inputs.matched_image_rows, inputs.matched_text, inputs.student_logit_scale),
            made.of(inputs.teacher_image_rows, inputs.teacher_text, scales.logit),
        )
        for inputs, scales in zip(teachers, settings.teachers, strict=True)
    ]
