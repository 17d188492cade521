"""Device memory of a training process, estimated from the spec and the models' sizes alone. docs/training.md compares it with measurements.

What is held at once in a step: weights, gradients and AdamW's two moments, in fp32; the activations of the pairs that go through the
student at once; and the objective's features and blocks of similarities. The processes hold equally much.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cliprd_core.model_size import Activations, ModelSize, Tower
from cliprd_core.objective_spec import MAX_KEPT_BLOCKS, ObjectiveSpec, TeacherCombination, default_block_elements
from cliprd_core.spec import Device, JobSpec
from cliprd_core.training_spec import Precision

FP32_BYTES = 4
STORE_CHUNK_ROWS = 256
"""Pairs that go through a teacher at once to fill its store, on a GPU; fewer on a CPU."""
BLOCKS_ALIVE = 8
"""Of similarities, at once."""
LOGITS_KEPT = 6
"""Of each teacher's similarities, beside those of the terms at work, where a process's rows are one block: 4 (the paper's) to 6."""


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of one training process on its device."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    objective: int
    least: int
    """What is surely needed, however short the captions: weights and moments, with the gradients or the images' saved activations."""

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.activations + self.objective


@dataclass(frozen=True)
class _Step:
    """What of the spec decides how much a step holds."""

    num_pairs: int  # of this process
    num_at_once: int  # pairs in one pass through the student
    num_teacher_rows: int  # in one pass through a teacher
    is_half: bool  # products are computed in two bytes

    @classmethod
    def of(cls, spec: JobSpec) -> _Step:
        at_once = pairs_at_once(spec)
        teacher_rows = min(at_once, STORE_CHUNK_ROWS) if spec.data.teacher_views else at_once
        return cls(_pairs_of_process(spec), at_once, teacher_rows, computes_in_half(spec))

    def activations_of(self, tower: Tower) -> Activations:
        activations = tower.bf16 if self.is_half else tower.fp32
        assert activations is not None
        return activations


def pairs_at_once(spec: JobSpec) -> int:
    """Pairs of one process in one pass through the student."""
    share = _pairs_of_process(spec)
    return min(share, spec.training.micro_batch_size or share)


def _pairs_of_process(spec: JobSpec) -> int:
    return spec.training.global_batch_size // spec.resources.num_processes


def computes_in_half(spec: JobSpec) -> bool:
    """Whether products are surely computed in two bytes a number. A CPU may compute bf16 in fp32."""
    return spec.training.precision is not Precision.FP32 and spec.resources.device is not Device.CPU


def estimate_memory(spec: JobSpec, student: ModelSize, teachers: Sequence[ModelSize]) -> MemoryEstimate:
    """The most that a training process holds at once, on its device.

    `teachers` in the spec's order. All models' activations are known.
    """
    step = _Step.of(spec)
    num_objective = num_objective_parameters(spec.objective, student.embed_dim, [teacher.embed_dim for teacher in teachers])
    num_trained = num_trained_parameters(spec.objective, student) + num_objective
    num_held = student.num_parameters + num_objective
    weights = FP32_BYTES * (num_held + sum(teacher.num_parameters for teacher in teachers))
    gradients, optimizer = FP32_BYTES * num_trained, 2 * FP32_BYTES * num_trained
    of_images = step.num_at_once * step.activations_of(student.image).saved
    return MemoryEstimate(
        weights=weights + (2 * num_trained if step.is_half else 0),  # autocast's copies, until the backward pass is done
        gradients=gradients,
        optimizer=optimizer,
        activations=max(_of_student(spec, step, student), *(_of_teacher(step, teacher) for teacher in teachers), 0),
        objective=_of_objective(spec, step, student, teachers),
        least=FP32_BYTES * num_held + optimizer + max(gradients, of_images),  # teachers may be read from stores alone
    )


def num_trained_parameters(objective: ObjectiveSpec, student: ModelSize) -> int:
    """Of the student; its logit scale is frozen where no term uses it."""
    return student.num_parameters - student.num_frozen - (0 if objective.uses_student_logit_scale else 1)


def num_objective_parameters(objective: ObjectiveSpec, student_width: int, teacher_widths: Sequence[int]) -> int:
    """Scales, projections and fusions that the objective learns."""
    if len(teacher_widths) > 1 and objective.teacher_combination is TeacherCombination.CONCATENATE:
        teacher_widths = [sum(teacher_widths)]
    return sum(_num_of_member(objective, student_width, width) for width in teacher_widths)


def _num_of_member(objective: ObjectiveSpec, student_width: int, teacher_width: int) -> int:
    """As `cliprd_core.objective.Objective` makes them."""
    weights = objective.part_weights

    def uses(*parts: str) -> bool:
        return any(weights[part] for part in parts)

    num_scales = uses("icl", "xrd") + uses("vrd_kl", "vrd_ce_image") + uses("vrd_kl", "vrd_ce_text") + uses("afd")
    num_fusion = 2 * ((student_width + teacher_width) * student_width + student_width) if uses("afd") else 0
    if student_width == teacher_width:
        return num_scales + num_fusion
    has_image = uses("fd", "gd", "icl", "xrd", "vrd_kl", "vrd_ce_image") or bool(objective.mfd)
    has_text = uses("fd", "gd", "icl", "xrd", "vrd_kl", "vrd_ce_text")
    return num_scales + num_fusion + (has_image + has_text) * student_width * teacher_width


def _of_student(spec: JobSpec, step: _Step, student: ModelSize) -> int:
    """At the start of the backward pass: all that the forward pass kept, and what the last layer works on."""
    image, text = (step.activations_of(tower) for tower in (student.image, student.text))
    num_views = 2 if spec.objective.mfd else 1
    pixels = 3 * student.image_size**2
    images = FP32_BYTES * pixels if step.is_half else 0  # beside their copies in half precision, which `saved` has
    kept = num_views * (image.saved + images) + text.saved
    whole_batch = step.num_pairs * pixels if spec.training.micro_batch_size is None else 0  # as 8-bit pixels
    return step.num_at_once * (kept + max(image.working, text.working)) + whole_batch


def _of_teacher(step: _Step, teacher: ModelSize) -> int:
    image, text = (step.activations_of(tower) for tower in (teacher.image, teacher.text))
    return step.num_teacher_rows * max(image.working + FP32_BYTES * 3 * teacher.image_size**2, text.working)


def _of_objective(spec: JobSpec, step: _Step, student: ModelSize, teachers: Sequence[ModelSize]) -> int:
    """Of each modality the student's features, normalised ones and their gradient, in both widths where they differ; the teacher's; what is
    gathered from other processes; and the blocks of similarities."""
    batch_size = spec.training.global_batch_size
    width = student.embed_dim
    numbers = 2 * step.num_pairs * 3 * width
    for teacher in teachers:
        matched = 0 if teacher.embed_dim == width else 3 * teacher.embed_dim
        numbers += 2 * step.num_pairs * (2 * teacher.embed_dim + matched)
    if spec.resources.num_processes > 1:
        numbers += batch_size * (5 * sum(teacher.embed_dim for teacher in teachers) or 2 * width)
    return FP32_BYTES * (numbers + _in_blocks(spec, step, len(teachers)))


def _in_blocks(spec: JobSpec, step: _Step, num_teachers: int) -> int:
    """Numbers in blocks of similarities."""
    batch_size = spec.training.global_batch_size
    block = default_block_elements(batch_size, on_gpu=spec.resources.device is not Device.CPU)
    similarity = step.num_pairs * batch_size
    if similarity > block:
        return BLOCKS_ALIVE * block
    return BLOCKS_ALIVE * similarity + min(LOGITS_KEPT * max(1, num_teachers) * similarity, MAX_KEPT_BLOCKS * block)
