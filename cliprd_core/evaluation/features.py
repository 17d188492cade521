"""Runs a model over images and texts for evaluation: threads decode ahead, the model's features come back normalised in fp32."""

from __future__ import annotations

import logging
import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Generic, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from cliprd_core.data.batch import Preprocess, Tokenizer
from cliprd_core.data.errors import CorruptSampleError, InvalidDataError
from cliprd_core.data.transforms import center_crop, decode_rgb, normalise
from cliprd_core.evaluation.datasets import ImageSet, Truth
from cliprd_core.precision import autocast, autocast_type
from cliprd_core.spec import Precision
from cliprd_core.text_encoding import encode_text

log = logging.getLogger(__name__)

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

    @property
    def batch_size(self) -> int:
        return CPU_BATCH_SIZE if self.device.type == "cpu" else GPU_BATCH_SIZE

    def image_features(self, images: ImageSet[Truth], name: str) -> Iterator[tuple[Tensor, list[Truth]]]:
        """Batch by batch, features (b, D) of the readable images and what is known of each. `name` is the set's, for messages.

        Raises:
            InvalidDataError: more than half of the images cannot be read.
        """
        num_read = 0
        for batch in _decoded_batches(images, self.preprocess, self.batch_size):
            for error in batch.corrupt:
                log.warning("an image of evaluation set %s is left out: %s", name, error)
            if batch.truths:
                num_read += len(batch.truths)
                yield self._encode_images(batch.pixels), batch.truths
        if 2 * num_read < images.num_images:
            raise InvalidDataError(f"{images.num_images - num_read} of the {images.num_images} images of {name} cannot be read")

    def text_features(self, texts: Sequence[str]) -> Tensor:
        """Features (len(texts), D)."""
        batches = [list(texts[start : start + self.batch_size]) for start in range(0, len(texts), self.batch_size)]
        return torch.cat([self._encode_texts(self.tokenizer(batch)) for batch in batches])

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


def _decoded_batches(images: ImageSet[Truth], preprocess: Preprocess, batch_size: int) -> Iterator[_DecodedBatch[Truth]]:
    """Every batch in order, decoded by threads (Pillow works without the interpreter's lock) at most a few batches ahead."""
    num_threads = min(os.cpu_count() or 1, MAX_THREADS)
    with ThreadPoolExecutor(num_threads, thread_name_prefix="evaluation-decode") as pool:
        pending: deque[Future[_DecodedBatch[Truth]]] = deque()
        try:
            for start in range(0, images.num_images, batch_size):
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
    return _DecodedBatch(normalise(pixels[: len(truths)], preprocess), truths, corrupt)
