"""Runs a model over images and texts for evaluation: threads decode ahead, the model's features come back normalised in fp32."""

from __future__ import annotations

import logging
import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from cliprd_core import distributed
from cliprd_core.control import ControlGroup
from cliprd_core.data.batch import Preprocess, Tokenizer
from cliprd_core.data.errors import CorruptSampleError, InvalidDataError
from cliprd_core.data.transforms import Normalise, center_crop, decode_rgb
from cliprd_core.evaluation.datasets import ImageSet, Truth
from cliprd_core.precision import autocast, autocast_type
from cliprd_core.text_encoding import encode_text
from cliprd_core.training_spec import Precision

log = logging.getLogger(__name__)

T = TypeVar("T")

CPU_BATCH_SIZE = 64  # a small ViT is half as fast again at 64 as at 256, where its activations leave the cache
GPU_BATCH_SIZE = 256
MAX_THREADS = 16


class ClipModel(Protocol):
    """What evaluation needs of a model; open_clip's have it."""

    def encode_image(self, image: Tensor, /, normalize: bool) -> Tensor: ...
    def encode_text(self, text: Tensor, /, normalize: bool) -> Tensor: ...


@dataclass(frozen=True)
class Evaluator:
    """A model and how to feed it."""

    model: ClipModel  # on `device`, in evaluation mode
    preprocess: Preprocess
    tokenizer: Tokenizer
    device: torch.device
    precision: Precision
    group: ControlGroup  # the processes that share the work; each must make the same calls

    @property
    def batch_size(self) -> int:
        return CPU_BATCH_SIZE if self.device.type == "cpu" else GPU_BATCH_SIZE

    def image_features(self, images: ImageSet[Truth], name: str) -> tuple[Tensor, list[Truth]] | None:
        """Features (N, D) of the N readable images and what is known of each, on the main process; None on the others.

        `name` is the set's, for messages.

        Raises:
            InvalidDataError: on the main process, if more than half of the images cannot be read.
        """
        batches = self._own(range(0, images.num_images, self.batch_size))
        features: list[Tensor] = []
        truths: list[list[Truth]] = []
        for batch in _decoded_batches(images, batches, self.preprocess, self.batch_size):
            for error in batch.corrupt:
                log.warning("an image of evaluation set %s is left out: %s", name, error)
            truths.append(batch.truths)
            features.append(self._encode_images(batch.pixels) if batch.truths else torch.empty(0, device=self.device))
        everyones_truths, joined = self.group.gather(truths), self._joined(features)
        if everyones_truths is None or joined is None:
            return None
        known = [truth for batch in _interleaved(everyones_truths) for truth in batch]
        if 2 * len(known) < images.num_images:
            raise InvalidDataError(f"{images.num_images - len(known)} of the {images.num_images} images of {name} cannot be read")
        return joined, known

    def text_features(self, texts: Sequence[str]) -> Tensor | None:
        """Features (len(texts), D) on the main process; None on the others."""
        starts = self._own(range(0, len(texts), self.batch_size))
        return self._joined([self._encode_texts(self.tokenizer(list(texts[start : start + self.batch_size]))) for start in starts])

    def _own(self, batches: range) -> range:
        """Every so many-th of the batches, so that a batch is the same one however many processes there are."""
        return batches[distributed.rank() :: distributed.world_size()]

    def _joined(self, own: list[Tensor]) -> Tensor | None:
        """All processes' batches of features in order, on this process's device, where it is the main one."""
        if distributed.world_size() == 1:
            return torch.cat(own)
        everyones = self.group.gather([features.cpu() for features in own])
        return None if everyones is None else torch.cat(_interleaved(everyones)).to(self.device)

    def _encode_images(self, pixels: Tensor) -> Tensor:
        with torch.no_grad(), autocast(self.device, autocast_type(self.precision, self.device)):
            features = self.model.encode_image(pixels.to(self.device), normalize=False)
        return _unit_rows(features)

    def _encode_texts(self, tokens: Tensor) -> Tensor:
        with torch.no_grad(), autocast(self.device, autocast_type(self.precision, self.device)):
            features = encode_text(self.model, tokens, self.device)
        return _unit_rows(features)


def _unit_rows(features: Tensor) -> Tensor:
    return F.normalize(features.float(), dim=-1)  # in fp32, not in the model's arithmetic


@dataclass(frozen=True)
class _DecodedBatch(Generic[Truth]):
    pixels: Tensor  # (b, 3, H, W) float32, normalised, of the readable images alone
    truths: list[Truth]
    corrupt: list[CorruptSampleError]


def _interleaved(everyones: list[list[T]]) -> list[T]:
    """What several processes did in turn, in order."""
    longest = max(len(own) for own in everyones)
    return [own[turn] for turn in range(longest) for own in everyones if turn < len(own)]


def _decoded_batches(images: ImageSet[Truth], starts: range, preprocess: Preprocess, batch_size: int) -> Iterator[_DecodedBatch[Truth]]:
    """The batches that begin at `starts`, in order, decoded at most a few ahead by threads: Pillow works without the interpreter's lock."""
    num_threads = min(os.cpu_count() or 1, MAX_THREADS)
    with ThreadPoolExecutor(num_threads, thread_name_prefix="evaluation-decode") as pool:
        pending: deque[Future[_DecodedBatch[Truth]]] = deque()
        try:
            for start in starts:
                numbers = range(start, min(start + batch_size, images.num_images))
                pending.append(pool.submit(_decode_batch, images, numbers, preprocess))
                if len(pending) > num_threads:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:  # after an error: do not decode the rest first
                future.cancel()


def _decode_batch(images: ImageSet[Truth], numbers: range, preprocess: Preprocess) -> _DecodedBatch[Truth]:
    pixels = np.empty((len(numbers), preprocess.image_size, preprocess.image_size, 3), dtype=np.uint8)
    truths: list[Truth] = []
    corrupt: list[CorruptSampleError] = []
    for number in numbers:
        try:
            known = images.read(number)
            pixels[len(truths)] = center_crop(decode_rgb(known.key, known.image_bytes), preprocess)
        except CorruptSampleError as error:
            corrupt.append(error)
        else:
            truths.append(known.truth)
    return _DecodedBatch(Normalise(preprocess)(torch.from_numpy(pixels[: len(truths)])), truths, corrupt)
