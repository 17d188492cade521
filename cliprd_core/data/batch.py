"""What the loader hands to the training step, and what a model says of its input."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
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
class StoredFeatures:
    """What a store holds of one teacher's features for the pairs of a batch: rows that are not present are arbitrary."""

    image: Tensor  # (B, D), L2-normalised
    image_present: Tensor  # (B,) bool
    text: Tensor  # (B, D), L2-normalised
    text_present: Tensor  # (B,) bool

    @classmethod
    def read(cls, reader: FeatureReader, indices: NDArray[np.int64], view: int) -> StoredFeatures:
        """What `reader` has now of the samples `indices` (B,), their images as cropped in `view`."""
        return cls(*reader.read_images(indices, view), *reader.read_texts(indices))

    def pin_memory(self) -> StoredFeatures:
        """The features in memory from which copies to a GPU overlap with computing; what is present is asked on the host alone."""
        return replace(self, image=self.image.pin_memory(), text=self.text.pin_memory())

    @property
    def is_complete(self) -> bool:
        return bool(self.image_present.all()) and bool(self.text_present.all())


class FeatureReader(Protocol):
    """Where a teacher's features may be found that were computed before. Used by several processes at once."""

    def read_images(self, indices: NDArray[np.int64], view: int) -> tuple[Tensor, Tensor]:
        """Features (B, D) of the images of the samples `indices` (B,) as cropped in `view`, and (B,) bool, which are there."""

    def read_texts(self, indices: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        """Features (B, D) of the captions of the samples `indices` (B,), and (B,) bool, which are there."""


class FeatureStore(FeatureReader, Protocol):
    """Keeps what it is given, and gives back the same bits."""

    def close(self) -> None:
        """Let go of it."""

    def rounded(self, features_bD: Tensor) -> Tensor:
        """(b, D) features as a reader will get them: L2-normalised, in the stored type, on the same device."""

    def write_images(self, indices: NDArray[np.int64], view: int, features_bD: Tensor) -> None:
        """Keep (b, D) features, as `rounded` gave them, of the images of samples `indices` (b,) as cropped in `view`."""

    def write_texts(self, indices: NDArray[np.int64], features_bD: Tensor) -> None:
        """Keep (b, D) features, as `rounded` gave them, of the captions of samples `indices` (b,)."""


@dataclass(frozen=True)
class Batch:
    """One process's share of a step. B is the number of pairs in it."""

    sample_indices: Tensor  # (B,) int64, position of each pair in the training set
    view: int  # which crop of each image this is; without a limit on their number, the epoch
    student_pixels: Tensor  # (B, H, W, 3) uint8; a quarter of what it is once normalised
    student_tokens: Tensor  # (B, context) int64
    teacher_pixels: tuple[Tensor | None, ...] = ()  # one per teacher; None: it sees student_pixels
    teacher_tokens: tuple[Tensor | None, ...] = ()  # one per teacher; None: it reads student_tokens
    stored_features: tuple[StoredFeatures | None, ...] = ()  # one per teacher, as they were when the batch was prepared; None: no store

    def to(self, device: torch.device) -> Batch:
        """Pixels on `device`, without waiting for the copies; tokens stay on the host, where `encode_text` reads off their lengths."""
        return self._with_pixels(lambda pixels: pixels.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        """In memory from which copies to a GPU overlap with computing."""
        tokens = tuple(None if one is None else one.pin_memory() for one in self.teacher_tokens)
        stored = tuple(None if one is None else one.pin_memory() for one in self.stored_features)
        pinned = self._with_pixels(lambda pixels: pixels.pin_memory())
        return replace(pinned, student_tokens=self.student_tokens.pin_memory(), teacher_tokens=tokens, stored_features=stored)

    def inputs_of_teacher(self, index: int) -> tuple[Tensor, Tensor]:
        """Pixels (B, H, W, 3) and tokens (B, context), these on the host, of one teacher whose features are not all stored."""
        stored = self.stored_features[index] if self.stored_features else None
        assert stored is None or not stored.is_complete, "its inputs were not prepared"
        pixels, tokens = self.teacher_pixels[index], self.teacher_tokens[index]
        return self.student_pixels if pixels is None else pixels, self.student_tokens if tokens is None else tokens

    def _with_pixels(self, move: Callable[[Tensor], Tensor]) -> Batch:
        teacher_pixels = tuple(None if pixels is None else move(pixels) for pixels in self.teacher_pixels)
        return replace(self, student_pixels=move(self.student_pixels), teacher_pixels=teacher_pixels)
