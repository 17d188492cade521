"""The order of training: properties that hold for every size, seed, epoch and number of processes."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cliprd_core.data.errors import InvalidDataError
from cliprd_core.data.hashing import permutation
from cliprd_core.data.plan import Plan

seeds = st.integers(0, 2**31 - 1)
epochs = st.integers(0, 10_000)


@given(seed=seeds, epoch=epochs, length=st.integers(1, 500))
def test_order_is_a_permutation(seed: int, epoch: int, length: int) -> None:
    assert sorted(permutation(seed, epoch, length).tolist()) == list(range(length))


@given(
    seed=seeds,
    epoch=epochs,
    batch_size=st.integers(1, 9),
    world_size=st.integers(1, 6),
    num_batches=st.integers(1, 6),
    extra=st.integers(0, 50),
)
def test_epoch_is_partitioned_over_steps_and_ranks(
    *, seed: int, epoch: int, batch_size: int, world_size: int, num_batches: int, extra: int
) -> None:
    global_batch_size = batch_size * world_size
    num_samples = global_batch_size * num_batches + min(extra, global_batch_size - 1)
    plans = [Plan(num_samples, global_batch_size, seed, rank, world_size) for rank in range(world_size)]
    single = Plan(num_samples, global_batch_size, seed)
    assert single.num_steps_per_epoch == num_batches
    seen: list[int] = []
    for step in range(num_batches):
        shares = [plan.request(epoch, step).indices for plan in plans]
        assert all(len(share) == batch_size for share in shares)
        joined = np.concatenate(shares).tolist()
        assert joined == single.request(epoch, step).indices.tolist()  # ranks in order make the one process's batch
        assert joined == plans[-1].request(epoch, step).global_indices.tolist()
        seen += joined
    assert len(set(seen)) == len(seen) == num_batches * global_batch_size
    assert set(seen) <= set(range(num_samples))
    assert seen == permutation(seed, epoch, num_samples)[: len(seen)].tolist()


@given(seed=seeds, epoch=epochs)
def test_orders_of_other_epochs_and_seeds_differ(seed: int, epoch: int) -> None:
    orders = [permutation(seed, epoch, 100), permutation(seed, epoch + 1, 100), permutation(seed + 1, epoch, 100)]
    for first in range(3):
        for second in range(first):
            assert (orders[first] == orders[second]).sum() < 20  # one in a hundred agrees by chance


def test_every_place_is_equally_likely() -> None:
    """Over many epochs, sample 0 comes first, and is among those dropped, as often as any other."""
    places = np.array([np.flatnonzero(permutation(0, epoch, 10) == 0)[0] for epoch in range(5000)])
    counts = np.bincount(places, minlength=10)
    assert ((counts - 500) ** 2 / 500).sum() < 40  # chi-square, 9 degrees of freedom


def test_unfitting_batches_are_refused() -> None:
    with pytest.raises(InvalidDataError, match=r"7 training pairs, fewer than one batch of 8.*global_batch_size"):
        Plan(7, 8, seed=0)
    with pytest.raises(ValueError, match=r"global_batch_size` \(8\) must be a multiple .* \(3\)"):
        Plan(100, 8, seed=0, rank=0, world_size=3)
