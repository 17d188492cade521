"""The job spec's `objective`: the weights of the loss terms, and how they are formed.

Pydantic only, as `cliprd_core.spec`, of which this is a part.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Self

from pydantic import Field, StrictFloat, model_validator

from cliprd_core.spec_model import SpecModel

BLOCK_ELEMENTS = 2**21
"""Of one block of similarities on a CPU, and on a GPU at large batches; about eight such blocks are alive at once, 67 MB in float32."""

MAX_KEPT_BLOCKS = 8
"""A process whose rows are one block keeps its logits between the passes, unless those of all similarities are more than so many blocks."""

_BATCH_OF_SMALLEST_BLOCKS = 2**15
_LARGEST_BLOCK = 4 * BLOCK_ELEMENTS

Weight = Annotated[StrictFloat, Field(ge=0.0, le=1e6)]


def default_block_elements(batch_size: int, *, on_gpu: bool) -> int:
    """The most elements of one block of similarities, for `batch_size` pairs over all processes.

    Blocks of 2^21 elements keep a CPU busy. A GPU spends more time on launching their kernels, so smaller batches have larger blocks there:
    as large as the memory allows that a batch of 32,768 takes with blocks of 2^21, most of which is features and their gradients.
    """
    if not on_gpu:
        return BLOCK_ELEMENTS
    return max(BLOCK_ELEMENTS, min(_LARGEST_BLOCK, BLOCK_ELEMENTS * _BATCH_OF_SMALLEST_BLOCKS // batch_size))


class ScaleMode(StrEnum):
    """How the objective's own learned scales become factors of logits. All start at the parameter ln(1/0.07)."""

    RAW = "raw"
    """The parameter itself, as in the reference implementation: factors start at 2.66 and nothing bounds them."""
    EXP = "exp"
    """Its exponential, as CLIP does: factors start at 14.3; the parameter is kept within [0, ln 100]."""


class TeacherCombination(StrEnum):
    """What several teachers teach together (MobileCLIP, arXiv 2311.17049, has both). Each has its own logit scale."""

    CONCATENATE = "concatenate"
    """One teacher of their features side by side, whose logits are the mean of theirs."""
    AVERAGE = "average"
    """Each teaches on its own, with its own projections and learned scales, and every term is the mean over teachers."""


class ObjectiveSpec(SpecModel):
    """Weights of the loss terms; 0 leaves a term out and it costs nothing. Equations: docs/objective.md."""

    task: Weight = Field(default=1.0, description="The student's own CLIP loss.")
    fd: Weight = Field(default=2000.0, description="Feature distillation (mean squared error).")
    icl: Weight = Field(default=1.0, description="Interactive contrastive learning.")
    hrd: Weight = Field(default=1.0, description="Horizontal relational distillation (CLIP-KD's CRD).")
    vrd: Weight = Field(default=1.0, description="Vertical relational distillation.")
    xrd: Weight = Field(default=1.0, description="Cross relational distillation.")
    mfd: Weight = Field(
        default=0.0,
        description="Masked feature distillation: the student's features of a masked image follow the teacher's of the whole one."
        " Costs one more pass through the student's image encoder. CLIP-KD's weight is 2000.",
    )
    mfd_mask_ratio: StrictFloat = Field(default=0.75, gt=0, lt=1, description="Fraction of an image's patches that `mfd` masks.")
    soft: Weight = Field(default=0.0, description="Soft targets: cross-entropy with the teacher's distribution (MobileCLIP, open_clip).")
    gd: Weight = Field(
        default=0.0,
        description="Gradient distillation (CLIP-KD), of losses summed over pairs, so that CLIP-KD's weight of 1e8 does not carry over.",
    )
    afd: Weight = Field(default=0.0, description="Augmented feature distillation (CLIP-KD): contrast of fused student-teacher features.")
    vrd_kl: Weight | None = Field(default=None, description="Weight of `vrd`'s agreement part. Null: `vrd`.")
    vrd_ce_image: Weight | None = Field(default=None, description="Weight of `vrd`'s image part. Null: `vrd`.")
    vrd_ce_text: Weight | None = Field(default=None, description="Weight of `vrd`'s text part. Null: `vrd`.")
    soft_temperature: StrictFloat | None = Field(
        default=None, gt=0.0, le=1e3, description="Temperature of `soft`'s teacher logits. Null: the teacher's own."
    )
    scale_mode: ScaleMode = Field(default=ScaleMode.RAW, description="How the teacher-student scales become factors of logits.")
    teacher_combination: TeacherCombination = Field(
        default=TeacherCombination.CONCATENATE, description="How several `teachers` teach together. With one it changes nothing."
    )

    @property
    def part_weights(self) -> dict[str, float]:
        """The weight of every term, with vrd's three parts in place of `vrd`."""
        parts = {"vrd_kl": self.vrd_kl, "vrd_ce_image": self.vrd_ce_image, "vrd_ce_text": self.vrd_ce_text}
        vertical = {part: self.vrd if weight is None else weight for part, weight in parts.items()}
        return {
            **{"task": self.task, "fd": self.fd, "icl": self.icl, "hrd": self.hrd},
            **vertical,
            **{"xrd": self.xrd, "soft": self.soft, "gd": self.gd, "afd": self.afd},
        }

    @property
    def distillation_terms(self) -> list[str]:
        """Names of the terms that are active and need a teacher; vrd's parts stand for it."""
        weights = {**self.part_weights, "mfd": self.mfd}
        return [part for part, weight in weights.items() if weight and part != "task"]

    @property
    def needs_teacher(self) -> bool:
        return bool(self.distillation_terms)

    @property
    def uses_student_logit_scale(self) -> bool:
        """Whether a term depends on the student's own logit scale."""
        return any((self.task, self.hrd, self.soft, self.gd))

    @model_validator(mode="after")
    def _some_weight(self) -> Self:
        if self.task:
            return self
        if not self.needs_teacher:
            raise ValueError("every weight is 0, so there is nothing to learn; set at least one above 0")
        if self.distillation_terms == ["mfd"]:
            raise ValueError("`mfd` alone teaches images and leaves the text encoder untrained; set another weight above 0")
        return self
