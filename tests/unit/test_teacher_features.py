"""Teacher features from stores and from running teachers: which rows are computed, and that both are the same numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import pytest
import torch
from torch import Tensor, nn

from cliprd_core import teacher_features
from cliprd_core.data.batch import Batch, FeatureStore, Preprocess, StoredFeatures
from cliprd_core.losses import unit_rows
from cliprd_core.models import ClipModel, LoadedModel
from cliprd_core.teacher_features import TeacherFeatures
from tests.feature_stores import MemoryStore

NUM_SAMPLES, NUM_ROWS, WIDTH = 40, 10, 6
CPU = torch.device("cpu")


class Encoder(nn.Module):
    """Features of an image are a map of its mean colour, of a text a map of its first two tokens; counts the rows it is shown."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.image_map = nn.Parameter(torch.randn(3, WIDTH, generator=generator), requires_grad=False)
        self.text_map = nn.Parameter(torch.randn(2, WIDTH, generator=generator), requires_grad=False)
        self.seen: dict[str, list[int]] = {"images": [], "texts": []}

    def encode_image(self, images: Tensor) -> Tensor:
        self.seen["images"].append(len(images))
        return images.mean(dim=(2, 3)) @ self.image_map

    def encode_text(self, tokens: Tensor, normalize: bool) -> Tensor:
        assert not normalize
        self.seen["texts"].append(len(tokens))
        return tokens[:, :2].float() @ self.text_map


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(teacher_features, "CPU_CHUNK_ROWS", 4)


def features_of(encoders: Sequence[Encoder], stores: Sequence[MemoryStore | None], micro_batch_size: int | None = None) -> TeacherFeatures:
    class Teacher:
        def __init__(self, model: Encoder) -> None:
            self.model = cast(ClipModel, model)
            self.preprocess = Preprocess(2, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))

    teachers = [cast(LoadedModel, Teacher(encoder)) for encoder in encoders]
    return TeacherFeatures(teachers, cast("Sequence[FeatureStore | None]", stores), CPU, None, micro_batch_size)


def make_batch(start: int, view: int, stores: Sequence[MemoryStore | None]) -> Batch:
    indices = torch.arange(start, start + NUM_ROWS)
    generator = torch.Generator().manual_seed(1000 * view)
    everything = torch.randint(0, 256, (NUM_SAMPLES, 2, 2, 3), generator=generator, dtype=torch.uint8)
    return Batch(
        sample_indices=indices,
        view=view,
        student_pixels=everything[indices],
        student_tokens=torch.stack([indices + 1, 2 * indices + 3, 0 * indices], dim=1),
        teacher_pixels=(None,) * len(stores),
        teacher_tokens=(None,) * len(stores),
        stored_features=tuple(None if store is None else StoredFeatures.read(store, indices.numpy(), view) for store in stores),
    )


def run(features: TeacherFeatures, batch: Batch) -> tuple[Tensor, Tensor]:
    image, text = features.of(batch)
    features.flush()
    assert image is not None
    assert text is not None
    return image, text


def test_a_store_fills_and_the_teacher_runs_no_more() -> None:
    encoder, store = Encoder(0), MemoryStore(NUM_SAMPLES, WIDTH, 2)
    features = features_of([encoder], [store])
    first = run(features, make_batch(0, 0, [store]))
    assert encoder.seen == {"images": [4, 4, 2], "texts": [4, 4, 2]}, "in chunks"
    again = run(features, make_batch(0, 0, [store]))
    assert encoder.seen == {"images": [4, 4, 2], "texts": [4, 4, 2]}
    for one, other in zip(first, again, strict=True):
        assert one.dtype == torch.float32
        assert torch.equal(one, other), "what was trained on is what will be read"
    run(features, make_batch(0, 1, [store]))
    assert encoder.seen == {"images": [4, 4, 2, 4, 4, 2], "texts": [4, 4, 2]}, "texts are the same in every view"


def test_stored_and_online_agree_to_the_precision_of_the_store() -> None:
    encoder, store = Encoder(0), MemoryStore(NUM_SAMPLES, WIDTH, 1)
    online = run(features_of([encoder], [None]), make_batch(3, 0, [None]))
    stored = run(features_of([encoder], [store]), make_batch(3, 0, [store]))
    for one, other in zip(online, stored, strict=True):
        torch.testing.assert_close(unit_rows(one), other, atol=2**-11, rtol=2**-10)
        assert not torch.equal(unit_rows(one), other)


def test_only_chunks_with_missing_rows_are_computed_and_only_missing_rows_kept() -> None:
    encoder, store = Encoder(0), MemoryStore(NUM_SAMPLES, WIDTH, 1)
    features = features_of([encoder], [store])
    whole = run(features, make_batch(0, 0, [store]))
    store.image_present[0, 5] = False
    store.images[0, 5] = torch.nan
    store.image_present[0, 8] = False
    encoder.seen["images"].clear()
    store.written_images.clear()
    again = run(features, make_batch(0, 0, [store]))
    assert encoder.seen["images"] == [4, 2]
    assert store.written_images == [(0, 5), (0, 8)]
    assert torch.equal(again[0], whole[0]), "a chunk is computed in the shape it always has"
    assert torch.equal(again[1], whole[1])


def test_what_was_written_since_the_batch_was_prepared_is_found() -> None:
    encoder, store = Encoder(0), MemoryStore(NUM_SAMPLES, WIDTH, 1)
    features = features_of([encoder], [store])
    early = make_batch(0, 0, [store])
    expected = run(features, make_batch(0, 0, [store]))
    encoder.seen["images"].clear()
    assert torch.equal(run(features, early)[0], expected[0])
    assert encoder.seen["images"] == []


def test_nothing_is_kept_before_the_step_ends() -> None:
    store = MemoryStore(NUM_SAMPLES, WIDTH, 1)
    features = features_of([Encoder(0)], [store])
    features.of(make_batch(0, 0, [store]))
    assert store.written_images == []
    features.flush()
    assert len(store.written_images) == NUM_ROWS
    features.flush()
    assert len(store.written_images) == NUM_ROWS


def test_several_teachers_stand_side_by_side_each_with_its_store_or_none() -> None:
    encoders = [Encoder(0), Encoder(1)]
    stores = [MemoryStore(NUM_SAMPLES, WIDTH, 1), None]
    image, text = run(features_of(encoders, stores), make_batch(0, 0, stores))
    assert image.shape == text.shape == (NUM_ROWS, 2 * WIDTH)
    for index, encoder in enumerate(encoders):
        alone = run(features_of([encoder], [None]), make_batch(0, 0, [None]))
        columns = slice(index * WIDTH, (index + 1) * WIDTH)
        torch.testing.assert_close(unit_rows(image[:, columns]), unit_rows(alone[0]), atol=1e-3, rtol=1e-3)
        torch.testing.assert_close(unit_rows(text[:, columns]), unit_rows(alone[1]), atol=1e-3, rtol=1e-3)


def test_micro_batches_bound_the_rows_a_teacher_sees() -> None:
    encoder, store = Encoder(0), MemoryStore(NUM_SAMPLES, WIDTH, 1)
    run(features_of([encoder], [None], micro_batch_size=3), make_batch(0, 0, [None]))
    assert encoder.seen["images"] == [3, 3, 2, 2]
    run(features_of([encoder], [store], micro_batch_size=3), make_batch(0, 0, [store]))
    assert max(encoder.seen["images"]) == 3


def test_without_teachers_there_are_no_features() -> None:
    assert features_of([], []).of(make_batch(0, 0, [])) == (None, None)


def test_completeness() -> None:
    def stored(image: list[bool], text: list[bool]) -> StoredFeatures:
        rows = torch.zeros(2, WIDTH)
        return StoredFeatures(rows, torch.tensor(image), rows, torch.tensor(text))

    assert stored([True, True], [True, True]).is_complete
    assert not stored([True, False], [True, True]).is_complete
    assert not stored([True, True], [False, True]).is_complete
