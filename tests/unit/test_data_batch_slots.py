"""A batch's way through shared memory: the same batch comes out, whole, and in memory of its own."""

import multiprocessing

import pytest
import torch

from cliprd_core.data.batch import Batch, StoredFeatures
from cliprd_core.data.batch_builder import BuiltBatch
from cliprd_core.data.batch_slots import BatchSlots, PackedBatch

IMAGE_SIZE = 24
NUM_PAIRS = 7
BYTES = NUM_PAIRS * (3 * IMAGE_SIZE**2 + 77 * 8)


def built(seed: int) -> BuiltBatch:
    generator = torch.Generator().manual_seed(seed)
    present = torch.rand(NUM_PAIRS, generator=generator) > 0.5
    batch = Batch(
        sample_indices=torch.arange(NUM_PAIRS) + seed,
        stand_ins=~present,
        view=seed,
        student_pixels=torch.randint(0, 256, (NUM_PAIRS, IMAGE_SIZE, IMAGE_SIZE, 3), generator=generator, dtype=torch.uint8),
        student_tokens=torch.randint(0, 49408, (NUM_PAIRS, 77), generator=generator),
        teacher_pixels=(None,),
        teacher_tokens=(None,),
        stored_features=(
            StoredFeatures(
                torch.rand(NUM_PAIRS, 512, generator=generator), present, torch.rand(NUM_PAIRS, 512, generator=generator), present
            ),
        ),
    )
    return BuiltBatch(batch, {seed: "it is broken"})


def tensors(one: BuiltBatch) -> list[torch.Tensor]:
    (stored,) = one.batch.stored_features
    assert stored is not None
    own = [one.batch.sample_indices, one.batch.stand_ins, one.batch.student_pixels, one.batch.student_tokens]
    return [*own, stored.image, stored.image_present, stored.text, stored.text_present]


def assert_same(one: BuiltBatch, other: BuiltBatch) -> None:
    assert one.corrupt == other.corrupt
    assert one.batch.view == other.batch.view
    assert one.batch.teacher_pixels == other.batch.teacher_pixels == (None,)
    for first, second in zip(tensors(one), tensors(other), strict=True):
        assert first.dtype == second.dtype
        assert torch.equal(first, second)


def packed_by_a_child(slots: BatchSlots, one: BuiltBatch, slot: int) -> PackedBatch:
    """As a loader process does it: forked, and sending the message through a pipe."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=lambda: sender.send(slots.pack(one, slot)))
    process.start()
    try:
        packed = receiver.recv()
    finally:
        process.join()
    assert isinstance(packed, PackedBatch)
    return packed


@pytest.mark.parametrize(
    "bytes_per_slot", [10 * BYTES, BYTES, 5_000, 0], ids=["all in the slot", "features beside", "pixels beside", "all beside"]
)
def test_another_process_sends_the_same_batch(bytes_per_slot: int) -> None:
    slots = BatchSlots(3, bytes_per_slot)
    assert_same(BatchSlots.unpack(packed_by_a_child(slots, built(5), 2)), built(5))


def test_the_arrays_it_was_made_for_are_not_in_the_message() -> None:
    packed = BatchSlots(1, 10 * BYTES).pack(built(1), 0)
    assert len(packed.message) < 2000
    assert len(packed.spans) == 4, "pixels, tokens, two kinds of features"


def test_an_unpacked_batch_does_not_change_with_its_slot() -> None:
    slots = BatchSlots(2, BYTES)
    unpacked = BatchSlots.unpack(slots.pack(built(1), 1))
    slots.pack(built(2), 1)
    assert_same(unpacked, built(1))
    assert all(tensor.is_contiguous() for tensor in tensors(unpacked))
    unpacked.batch.student_pixels[0] = 0  # and it may be written to


def test_slots_do_not_overlap() -> None:
    slots = BatchSlots(4, 10 * BYTES)
    packed = [slots.pack(built(number), number) for number in range(4)]
    for number in range(4):
        assert_same(BatchSlots.unpack(packed[number]), built(number))


def test_two_sets_of_slots_are_told_apart() -> None:
    first, second = BatchSlots(1, BYTES), BatchSlots(1, BYTES)
    packed = [first.pack(built(1), 0), second.pack(built(2), 0)]
    assert_same(BatchSlots.unpack(packed[0]), built(1))
    assert_same(BatchSlots.unpack(packed[1]), built(2))
