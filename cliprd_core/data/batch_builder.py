"""Turns the numbers of pairs into a batch: reading, decoding, cropping, tokenising, and standing in for pairs that cannot be read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from numpy.typing import NDArray

from cliprd_core.data.batch import Batch, ModelInput
from cliprd_core.data.errors import CorruptSampleError, InvalidDataError
from cliprd_core.data.hashing import CROP_STREAM, stream_key, uniforms
from cliprd_core.data.plan import BatchRequest
from cliprd_core.data.sources import PairSource
from cliprd_core.data.tokens import TokenCache, same_tokens
from cliprd_core.data.transforms import (
    DRAWS_PER_CROP,
    check_preprocess,
    decode_for_crop,
    decode_rgb,
    normalise,
    open_image,
    random_crop_box,
    resize_crop,
)


@dataclass(frozen=True)
class BuiltBatch:
    """A batch, and what could not be read on the way to it: sample number to reason."""

    batch: Batch
    corrupt: dict[int, str]

    def pin_memory(self) -> BuiltBatch:
        """Called by torch's DataLoader where the copy to a GPU is to overlap with computing."""
        batch = self.batch
        return replace(
            self,
            batch=Batch(
                sample_indices=batch.sample_indices,
                student_images=batch.student_images.pin_memory(),
                student_tokens=batch.student_tokens.pin_memory(),
                teacher_images=None if batch.teacher_images is None else batch.teacher_images.pin_memory(),
                teacher_tokens=None if batch.teacher_tokens is None else batch.teacher_tokens.pin_memory(),
            ),
        )


@dataclass
class _Draft:
    """A batch in the making; rows are filled one at a time so that no decoded original outlives its crop."""

    indices: list[int]
    captions: list[str]
    student_pixels: NDArray[np.uint8]  # (b, H, W, 3)
    teacher_pixels: NDArray[np.uint8] | None  # None: no teacher, or the student's size
    corrupt: dict[int, str] = field(default_factory=dict)


class BatchBuilder:
    """Builds any process's batch of any step, as a pure function of the request and of the data."""

    def __init__(
        self, source: PairSource, *, student: ModelInput, teacher: ModelInput | None, crop_scale: tuple[float, float], seed: int
    ) -> None:
        for model_input in (student, teacher):
            if model_input is not None:
                check_preprocess(model_input.preprocess)
        self._source = source
        self._student = student
        self._teacher = teacher
        self._crop_scale = crop_scale
        self._largest_size = max(one.preprocess.image_size for one in (student, teacher) if one is not None)  # pixels
        self._seed = seed
        self._student_tokens = TokenCache(student, len(source))
        self._teacher_tokens = None if teacher is None or same_tokens(student, teacher) else TokenCache(teacher, len(source))

    def build(self, request: BatchRequest) -> BuiltBatch:
        """Read and prepare the pairs of one process's share of a step.

        A pair that cannot be read is replaced by the next readable one of the data, in the data's own order.

        Raises:
            InvalidDataError: more than half of the step's global batch cannot be read.
        """
        draft = self._empty_draft(request)
        draws = self._draws(draft.indices, request.epoch)
        unread = [row for row, index in enumerate(draft.indices) if not self._fill(draft, row, index, draws[row])]
        if 2 * len(unread) > request.num_rows:  # more than half of the step implies more than half of some process's share
            self._refuse_mostly_corrupt(request, draft.corrupt)
        for row in unread:
            self._fill_with_next(draft, row, request.epoch)
        return BuiltBatch(self._finish(draft), draft.corrupt)

    def _empty_draft(self, request: BatchRequest) -> _Draft:
        size = self._student.preprocess.image_size
        indices: list[int] = request.indices.tolist()
        return _Draft(
            indices=indices,
            captions=[""] * len(indices),
            student_pixels=np.empty((len(indices), size, size, 3), dtype=np.uint8),
            teacher_pixels=self._teacher_pixels(len(indices)),
        )

    def _teacher_pixels(self, num_rows: int) -> NDArray[np.uint8] | None:
        if self._teacher is None or _same_pixels(self._student, self._teacher):
            return None
        size = self._teacher.preprocess.image_size
        return np.empty((num_rows, size, size, 3), dtype=np.uint8)

    def _fill(self, draft: _Draft, row: int, index: int, draws: Sequence[float]) -> bool:
        """Put pair `index`, cropped by `draws`, into `row`; False, and a note in `draft.corrupt`, if it cannot be read."""
        try:
            sample = self._source.read(index)
            encoded = open_image(sample.key, sample.image_bytes)
            box = random_crop_box(encoded.width, encoded.height, self._crop_scale, draws)
            image, box_in_image = decode_for_crop(sample.key, encoded, box, self._largest_size)
        except CorruptSampleError as error:
            draft.corrupt[index] = str(error)
            return False
        draft.indices[row] = index
        draft.captions[row] = sample.caption
        draft.student_pixels[row] = resize_crop(image, box_in_image, self._student.preprocess)
        if self._teacher is not None and draft.teacher_pixels is not None:
            draft.teacher_pixels[row] = resize_crop(image, box_in_image, self._teacher.preprocess)
        return True

    def _draws(self, indices: Sequence[int], epoch: int) -> list[list[float]]:
        """The random numbers of each pair's crop: a function of seed, epoch and pair, and of nothing else."""
        key = stream_key(CROP_STREAM, self._seed, epoch)
        draws: list[list[float]] = uniforms(key, np.array(indices, dtype=np.int64), DRAWS_PER_CROP).tolist()
        return draws

    def _fill_with_next(self, draft: _Draft, row: int, epoch: int) -> None:
        num_samples = len(self._source)
        start = draft.indices[row]
        for offset in range(1, num_samples):
            index = (start + offset) % num_samples
            if self._fill(draft, row, index, self._draws([index], epoch)[0]):
                return
        raise InvalidDataError(f"none of the {num_samples} training pairs can be read; the first trouble was: {draft.corrupt[start]}")

    def _refuse_mostly_corrupt(self, request: BatchRequest, corrupt: dict[int, str]) -> None:
        """Read the other processes' rows too, and raise if most of the step is corrupt."""
        num_corrupt = 0
        for index in request.global_indices.tolist():
            num_corrupt += index in corrupt or not self._is_readable(index)
        if 2 * num_corrupt > len(request.global_indices):
            raise InvalidDataError(
                f"{num_corrupt} of the {len(request.global_indices)} pairs of one batch cannot be read; check the training data."
                f" For example {next(iter(corrupt.values()))}"
            )

    def _is_readable(self, index: int) -> bool:
        try:
            sample = self._source.read(index)
            decode_rgb(sample.key, sample.image_bytes)
        except CorruptSampleError:
            return False  # reported by the process whose row it is
        return True

    def _finish(self, draft: _Draft) -> Batch:
        teacher_images = None
        if self._teacher is not None and self._teacher.preprocess != self._student.preprocess:
            pixels = draft.student_pixels if draft.teacher_pixels is None else draft.teacher_pixels
            teacher_images = normalise(pixels, self._teacher.preprocess)
        return Batch(
            sample_indices=torch.tensor(draft.indices, dtype=torch.int64),
            student_images=normalise(draft.student_pixels, self._student.preprocess),
            student_tokens=self._student_tokens.tokenise(draft.indices, draft.captions),
            teacher_images=teacher_images,
            teacher_tokens=None if self._teacher_tokens is None else self._teacher_tokens.tokenise(draft.indices, draft.captions),
        )


def _same_pixels(first: ModelInput, second: ModelInput) -> bool:
    """Whether a crop looks the same to both before it is normalised."""
    one, other = first.preprocess, second.preprocess
    return (one.image_size, one.interpolation) == (other.image_size, other.interpolation)
