"""The teachers' features of a batch: from their stores where they have been computed before, else by running the teachers.

What is computed for a store is rounded to the store's type before it is trained on, so that a step sees the same numbers whether they
were just computed or read. To be the same bits whoever computes them, they are computed in chunks of a batch's rows that depend on nothing
but the batch: a chunk of which any row is missing is computed whole, again in the same shape, and only what was missing is kept. A run that
was killed at any moment, and resumes over a half-filled store, ends with the weights of one never interrupted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cliprd_core.data.batch import Batch, FeatureStore, StoredFeatures
from cliprd_core.data.transforms import Normalise
from cliprd_core.models import LoadedModel
from cliprd_core.precision import autocast
from cliprd_core.text_encoding import encode_text

CPU_CHUNK_ROWS = 64
GPU_CHUNK_ROWS = 256

Encode = Callable[[Tensor], Tensor]
"""Inputs (b, …), on the host or on the device, to features (b, D), fp32, on the device."""


@dataclass(frozen=True)
class _Write:
    """Features on their way to the host."""

    keep: Callable[[Tensor, Tensor], None]
    rows: Tensor  # (b,) places in the batch
    features: Tensor  # on the host, complete once `copied` has happened
    copied: torch.cuda.Event | None  # None: complete already


class TeacherFeatures:
    """Gives the teachers' features of batches, side by side, and fills their stores on the way."""

    def __init__(
        self,
        teachers: Sequence[LoadedModel],
        stores: Sequence[FeatureStore | None],
        device: torch.device,
        autocast_type: torch.dtype | None,
        micro_batch_size: int | None,
    ) -> None:
        """
        Args:
            teachers: frozen, in evaluation mode, on any device: each moves to `device` when it first has to run.
            stores: one for each teacher, or None: it runs in every step.
            device: where features are wanted.
            autocast_type: the type of the teachers' matrix products; None: fp32.
            micro_batch_size: the most rows that go through a teacher at once; None: no limit for a teacher without a store.
        """
        assert len(stores) == len(teachers)
        self._teachers = list(zip(teachers, stores, strict=True))
        self._normalise = {teacher.preprocess: Normalise(teacher.preprocess) for teacher in teachers}
        self._device = device
        self._autocast_type = autocast_type
        self._micro_batch_size = micro_batch_size
        chunk_rows = CPU_CHUNK_ROWS if device.type == "cpu" else GPU_CHUNK_ROWS
        self._chunk_rows = min(chunk_rows, micro_batch_size or chunk_rows)
        self._writes: list[_Write] = []

    @torch.no_grad()  # not inference_mode: the loss keeps the features for its backward pass
    def of(self, batch: Batch) -> tuple[Tensor | None, Tensor | None]:
        """Image and text features, (B, sum of the teachers' widths) each, fp32, on the device; None without teachers.

        Pixels may be on the host or on the device. Call `flush` before the end of the step.
        """
        if not self._teachers:
            return None, None
        features = [
            self._online(index, teacher, batch) if store is None else self._stored(index, teacher, store, batch)
            for index, (teacher, store) in enumerate(self._teachers)
        ]
        images, texts = zip(*features, strict=True)
        return torch.cat(images, dim=1), torch.cat(texts, dim=1)

    def flush(self) -> None:
        """Hand to the stores what `of` computed. The copies were begun there, so this hardly waits."""
        writes, self._writes = self._writes, []
        for write in writes:
            if write.copied is not None:
                write.copied.synchronize()
            write.keep(write.rows, write.features)

    def close(self) -> None:
        """Let go of the stores; not to be used afterwards."""
        for _, store in self._teachers:
            if store is not None:
                store.close()

    def _online(self, index: int, teacher: LoadedModel, batch: Batch) -> tuple[Tensor, Tensor]:
        pixels, tokens = batch.inputs_of_teacher(index)
        rows = self._micro_batch_size or len(pixels)
        of_images, of_texts = self._encoders(teacher)
        return _in_chunks(of_images, pixels, rows), _in_chunks(of_texts, tokens, rows)

    def _stored(self, index: int, teacher: LoadedModel, store: FeatureStore, batch: Batch) -> tuple[Tensor, Tensor]:
        indices = batch.sample_indices.numpy()
        found = batch.stored_features[index]
        assert found is not None, "the loader was given another set of stores"
        if not found.is_complete:
            found = StoredFeatures.read(store, indices, batch.view)  # with what has been written since the batch was prepared
        image, text = (one.to(self._device, non_blocking=True) for one in (found.image, found.text))
        if not found.is_complete:
            pixels, tokens = batch.inputs_of_teacher(index)
            of_images, of_texts = self._encoders(teacher)

            def keep_images(rows: Tensor, features: Tensor) -> None:
                store.write_images(indices[rows.numpy()], batch.view, features)

            def keep_texts(rows: Tensor, features: Tensor) -> None:
                store.write_texts(indices[rows.numpy()], features)

            image = self._completed(image, found.image_present, pixels, lambda part: store.rounded(of_images(part)), keep_images)
            text = self._completed(text, found.text_present, tokens, lambda part: store.rounded(of_texts(part)), keep_texts)
        return image.float(), text.float()

    def _completed(
        self, stored_BD: Tensor, present_B: Tensor, inputs: Tensor, encode: Encode, keep: Callable[[Tensor, Tensor], None]
    ) -> Tensor:
        """`stored_BD` with its missing rows computed, chunk by chunk; they are kept, by their places in the batch, at the next `flush`."""
        parts = []
        for start in range(0, len(inputs), self._chunk_rows):
            chunk = slice(start, start + self._chunk_rows)
            missing = (~present_B[chunk]).nonzero().flatten()
            part_bD = stored_BD[chunk]
            if len(missing):
                computed_bD = encode(inputs[chunk])
                present_b1 = present_B[chunk, None].to(self._device, non_blocking=True)
                part_bD = torch.where(present_b1, part_bD, computed_bD)
                self._keep_later(start + missing, computed_bD[missing.to(self._device)], keep)
            parts.append(part_bD)
        return torch.cat(parts)

    def _keep_later(self, rows: Tensor, features: Tensor, keep: Callable[[Tensor, Tensor], None]) -> None:
        if features.device.type == "cpu":
            self._writes.append(_Write(keep, rows, features, None))
            return
        on_host = torch.empty(features.shape, dtype=features.dtype, pin_memory=True)
        on_host.copy_(features, non_blocking=True)
        copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
        copied.record()
        self._writes.append(_Write(keep, rows, on_host, copied))

    def _encoders(self, teacher: LoadedModel) -> tuple[Encode, Encode]:
        model = teacher.model.to(self._device)  # a look at its parameters, if it is there
        normalise = self._normalise[teacher.preprocess].to(self._device)

        def of_images(pixels: Tensor) -> Tensor:
            images = normalise(pixels.to(self._device, non_blocking=True))
            with autocast(self._device, self._autocast_type):
                return model.encode_image(images).float()

        def of_texts(tokens: Tensor) -> Tensor:
            with autocast(self._device, self._autocast_type):
                return encode_text(model, tokens, self._device).float()

        return of_images, of_texts


def _in_chunks(encode: Encode, inputs: Tensor, num_rows: int) -> Tensor:
    """Features (B, D) of inputs (B, …), as few rows at a time as `num_rows` allows, as even as can be."""
    return torch.cat([encode(part) for part in inputs.tensor_split(-(-len(inputs) // num_rows))])
