"""Which pairs make up which step: the order of training, without any state."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cliprd_core.data.errors import InvalidDataError
from cliprd_core.data.hashing import permutation


@dataclass(frozen=True)
class BatchRequest:
    """One process's share of one step, as sent to a loader process."""

    epoch: int
    global_indices: NDArray[np.int64]  # (B,) the whole step's pairs
    first_row: int  # this process's rows of the step are first_row : first_row + num_rows
    num_rows: int

    @property
    def indices(self) -> NDArray[np.int64]:
        """(b,) this process's pairs."""
        return self.global_indices[self.first_row : self.first_row + self.num_rows]


@dataclass(frozen=True)
class Plan:
    """The steps of every epoch. Each epoch visits each pair at most once; the last incomplete batch is dropped.

    The global batch of a step does not depend on `world_size`: ranks hold consecutive rows of it, in the order of the ranks.
    """

    num_samples: int
    global_batch_size: int
    seed: int
    rank: int = 0
    world_size: int = 1

    def __post_init__(self) -> None:
        assert 0 <= self.rank < self.world_size, (self.rank, self.world_size)
        if self.global_batch_size % self.world_size:
            raise ValueError(
                f"`training.global_batch_size` ({self.global_batch_size}) must be a multiple of the number of processes ({self.world_size})"
            )
        if self.num_samples < self.global_batch_size:
            raise InvalidDataError(
                f"there are {self.num_samples} training pairs, fewer than one batch of {self.global_batch_size}; lower"
                " `training.global_batch_size` or add data"
            )

    @property
    def num_steps_per_epoch(self) -> int:
        return self.num_samples // self.global_batch_size

    @property
    def batch_size(self) -> int:
        """Pairs per process."""
        return self.global_batch_size // self.world_size

    def request(self, epoch: int, step: int) -> BatchRequest:
        """Step `step` of epoch `epoch`, both from 0; the step counts within the epoch."""
        assert 0 <= step < self.num_steps_per_epoch, step
        start = step * self.global_batch_size
        # A copy, since a view would be pickled with the whole epoch's order behind it.
        indices = _order(self.seed, epoch, self.num_samples)[start : start + self.global_batch_size].copy()
        return BatchRequest(epoch, indices, self.rank * self.batch_size, self.batch_size)


@functools.lru_cache(maxsize=1)
def _order(seed: int, epoch: int, num_samples: int) -> NDArray[np.int64]:
    order = permutation(seed, epoch, num_samples)
    order.flags.writeable = False
    return order
