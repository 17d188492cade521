"""What the loader hands to the training step, and what a model says of its input."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Tokenizer = Callable[[list[str]], Tensor]
"""Captions to token ids (B, context_length), int64, padded."""


@dataclass(frozen=True)
class Preprocess:
    """How a model wants its images; what `open_clip_config.json` calls `preprocess_cfg`."""

    image_size: int  # pixels, height and width
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: str = "bicubic"
    resize_mode: str = "shortest"


@dataclass(frozen=True)
class ModelInput:
    """What one model is fed with."""

    preprocess: Preprocess
    tokenizer: Tokenizer
    context_length: int  # tokens of one caption, padding included


@dataclass(frozen=True)
class Batch:
    """One process's share of a step. B is the number of pairs in it."""

    sample_indices: Tensor  # (B,) int64, position of each pair in the training set
    student_images: Tensor  # (B, 3, H, W) float32, normalised
    student_tokens: Tensor  # (B, context) int64
    teacher_images: tuple[Tensor | None, ...] = ()  # one per teacher; None: it sees student_images
    teacher_tokens: tuple[Tensor | None, ...] = ()  # one per teacher; None: it reads student_tokens

    def to(self, device: torch.device) -> Batch:
        """Everything but the indices on `device`, without waiting for the copies."""
        return self._with(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        """Everything but the indices in memory from which copies to a GPU overlap with computing."""
        return self._with(lambda tensor: tensor.pin_memory())

    def inputs_of_teacher(self, index: int) -> tuple[Tensor, Tensor]:
        """Images (B, 3, H, W) and tokens (B, context) of one teacher."""
        images, tokens = self.teacher_images[index], self.teacher_tokens[index]
        return self.student_images if images is None else images, self.student_tokens if tokens is None else tokens

    def _with(self, move: Callable[[Tensor], Tensor]) -> Batch:
        def each(tensors: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
            return tuple(None if tensor is None else move(tensor) for tensor in tensors)

        return Batch(
            sample_indices=self.sample_indices,
            student_images=move(self.student_images),
            student_tokens=move(self.student_tokens),
            teacher_images=each(self.teacher_images),
            teacher_tokens=each(self.teacher_tokens),
        )
