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
    teacher_images: Tensor | None  # None: there is no teacher, or it sees student_images
    teacher_tokens: Tensor | None  # None: there is no teacher, or it reads student_tokens

    def to(self, device: torch.device) -> Batch:
        """Images on `device`; tokens stay on the host, where `text_encoding.encode_text` reads off their lengths."""
        teacher_images = None if self.teacher_images is None else self.teacher_images.to(device, non_blocking=True)
        student_images = self.student_images.to(device, non_blocking=True)
        return replace(self, student_images=student_images, teacher_images=teacher_images)
