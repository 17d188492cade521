"""What the loader hands to the training step, and what a model says of its input."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

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
        """Images on `device`, without waiting for the copies; tokens stay on the host, where `encode_text` reads off their lengths."""

        def move(images: Tensor) -> Tensor:
            return images.to(device, non_blocking=True)

        return replace(self, student_images=move(self.student_images), teacher_images=_each(move, self.teacher_images))

    def pin_memory(self) -> Batch:
        """Everything but the indices in memory from which copies to a GPU overlap with computing."""
        return Batch(
            sample_indices=self.sample_indices,
            student_images=self.student_images.pin_memory(),
            student_tokens=self.student_tokens.pin_memory(),
            teacher_images=_each(Tensor.pin_memory, self.teacher_images),
            teacher_tokens=_each(Tensor.pin_memory, self.teacher_tokens),
        )

    def inputs_of_teacher(self, index: int) -> tuple[Tensor, Tensor]:
        """Images (B, 3, H, W) and tokens (B, context) of one teacher."""
        images, tokens = self.teacher_images[index], self.teacher_tokens[index]
        return self.student_images if images is None else images, self.student_tokens if tokens is None else tokens


def _each(function: Callable[[Tensor], Tensor], tensors: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    return tuple(None if tensor is None else function(tensor) for tensor in tensors)
