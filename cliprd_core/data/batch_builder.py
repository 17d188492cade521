"""Turns the numbers of pairs into a batch: reading, decoding, cropping, tokenising, and standing in for pairs that cannot be read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cliprd_core.data.batch import Batch, FeatureReader, ModelInput, StoredFeatures
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
        return replace(self, batch=self.batch.pin_memory())


class _Crop(NamedTuple):
    """What a crop's pixels depend on, before they are normalised; models that agree in it share them."""

    size: int  # pixels, height and width
    interpolation: str


@dataclass
class _Draft:
    """A batch in the making; rows are filled one at a time so that no decoded original outlives its crop."""

    indices: list[int]
    captions: list[str]
    pixels: dict[_Crop, NDArray[np.uint8]]  # (b, H, W, 3) of each kind of crop that a model wants
    corrupt: dict[int, str] = field(default_factory=dict)


class BatchBuilder:
    """Builds any process's batch of any step, as a pure function of the request and of the data."""

    def __init__(
        self,
        source: PairSource,
        *,
        student: ModelInput,
        teachers: Sequence[ModelInput],
        crop_scale: tuple[float, float],
        seed: int,
        num_views: int = 0,
        readers: Sequence[FeatureReader | None] = (),
    ) -> None:
        """
        Args:
            num_views: different crops of each image, which epochs take in turn. 0: a new one every epoch.
            readers: where each teacher's features may be stored; empty, or one (or None) per teacher.
        """
        for model_input in (student, *teachers):
            check_preprocess(model_input.preprocess)
        self._source = source
        self._student = student
        self._teachers = teachers
        self._crops = {_crop(model_input): model_input.preprocess for model_input in (student, *teachers)}
        self._crop_scale = crop_scale
        self._largest_size = largest_image_size(student, teachers)
        self._seed = seed
        self._num_views = num_views
        self._readers = readers or [None] * len(teachers)
        assert len(self._readers) == len(teachers)
        self._student_tokens = TokenCache(student, len(source))
        self._teacher_tokens = [None if same_tokens(student, teacher) else TokenCache(teacher, len(source)) for teacher in teachers]

    @property
    def bytes_per_pair(self) -> int:
        """What one pair takes in a batch at most, stored features aside."""
        pixels = sum(3 * crop.size**2 for crop in self._crops)
        tokens = sum(8 * model_input.context_length for model_input in (self._student, *self._teachers))
        return pixels + tokens

    def build(self, request: BatchRequest) -> BuiltBatch:
        """Read and prepare the pairs of one process's share of a step.

        A pair that cannot be read is replaced by the next readable one of the data, in the data's own order. Teachers whose features are
        all stored get no images and no tokens.

        Raises:
            InvalidDataError: more than half of the step's global batch cannot be read.
        """
        view = request.epoch % self._num_views if self._num_views else request.epoch
        stored = [None if reader is None else StoredFeatures.read(reader, request.indices, view) for reader in self._readers]
        crops = self._crops_for(stored)
        while True:
            draft = self._filled(request, view, crops)
            # A pair may stand in at several places of a step, and would be computed in several ways; so no store is asked for it.
            stand_ins = torch.from_numpy(np.array(draft.indices, dtype=np.int64) != request.indices)
            found = [None if one is None else one.without(stand_ins) for one in stored]
            if self._crops_for(found) <= crops:
                return BuiltBatch(self._finish(draft, view, stand_ins, found), draft.corrupt)
            crops |= self._crops_for(found)  # what could be read is tried anew, and may differ; the crops only grow, so this ends

    def _crops_for(self, stored: Sequence[StoredFeatures | None]) -> set[_Crop]:
        """What the student and the teachers that are to run want."""
        return {_crop(self._student)} | {_crop(teacher) for teacher, found in zip(self._teachers, stored, strict=True) if _must_run(found)}

    def _filled(self, request: BatchRequest, view: int, crops: set[_Crop]) -> _Draft:
        indices: list[int] = request.indices.tolist()
        pixels = {crop: np.empty((len(indices), crop.size, crop.size, 3), dtype=np.uint8) for crop in crops}
        draft = _Draft(indices=indices, captions=[""] * len(indices), pixels=pixels)
        draws = self._draws(draft.indices, view)
        unread = [row for row, index in enumerate(draft.indices) if not self._fill(draft, row, index, draws[row])]
        if 2 * len(unread) > request.num_rows:  # more than half of the step implies more than half of some process's share
            self._refuse_mostly_corrupt(request, draft.corrupt)
        for row in unread:
            self._fill_with_next(draft, row, view)
        return draft

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
        for crop, pixels in draft.pixels.items():
            pixels[row] = resize_crop(image, box_in_image, self._crops[crop])
        return True

    def _draws(self, indices: Sequence[int], view: int) -> list[list[float]]:
        """The random numbers of each pair's crop: a function of seed, view and pair, and of nothing else."""
        key = stream_key(CROP_STREAM, self._seed, view)
        draws: list[list[float]] = uniforms(key, np.array(indices, dtype=np.int64), DRAWS_PER_CROP).tolist()
        return draws

    def _fill_with_next(self, draft: _Draft, row: int, view: int) -> None:
        num_samples = len(self._source)
        start = draft.indices[row]
        for offset in range(1, num_samples):
            index = (start + offset) % num_samples
            if self._fill(draft, row, index, self._draws([index], view)[0]):
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

    def _finish(self, draft: _Draft, view: int, stand_ins: Tensor, stored: Sequence[StoredFeatures | None]) -> Batch:
        def pixels(model_input: ModelInput) -> Tensor:
            return torch.from_numpy(draft.pixels[_crop(model_input)])

        def tokens(cache: TokenCache) -> Tensor:
            return cache.tokenise(draft.indices, draft.captions)

        return Batch(
            sample_indices=torch.tensor(draft.indices, dtype=torch.int64),
            stand_ins=stand_ins,
            view=view,
            student_pixels=pixels(self._student),
            student_tokens=tokens(self._student_tokens),
            teacher_pixels=tuple(
                pixels(teacher) if _crop(teacher) != _crop(self._student) and _must_run(found) else None
                for teacher, found in zip(self._teachers, stored, strict=True)
            ),
            teacher_tokens=tuple(
                tokens(cache) if cache is not None and _must_run(found) else None
                for cache, found in zip(self._teacher_tokens, stored, strict=True)
            ),
            stored_features=tuple(stored),
        )


def largest_image_size(student: ModelInput, teachers: Sequence[ModelInput]) -> int:
    """Pixels: images are decoded no finer than this needs, so all models' crops depend on it a little."""
    return max(model_input.preprocess.image_size for model_input in (student, *teachers))


def _must_run(stored: StoredFeatures | None) -> bool:
    """Whether the teacher has to compute features of this batch."""
    return stored is None or not stored.is_complete


def _crop(model_input: ModelInput) -> _Crop:
    return _Crop(model_input.preprocess.image_size, model_input.preprocess.interpolation)
