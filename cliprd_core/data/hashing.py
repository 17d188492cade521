"""Randomness as a pure function of its coordinates: the order of an epoch, the crop of a sample.

Nothing here keeps a state, so nothing depends on how many processes load, in which order they run, or where a run was resumed. The
generator is SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014), written out because
library generators promise no equal streams from one release to the next, and a resumed run may meet another release.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

GOLDEN_GAMMA = np.uint64(0x9E3779B97F4A7C15)

ORDER_STREAM = 1
CROP_STREAM = 2


def mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """SplitMix64's output function, elementwise: a bijection of 64 bits in which every input bit sways every output bit."""
    mixed = values + GOLDEN_GAMMA
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))


def stream_key(*coordinates: int) -> NDArray[np.uint64]:
    """One key (1,) for a stream named by whole numbers >= 0, such as (CROP_STREAM, seed, epoch)."""
    key = np.zeros(1, dtype=np.uint64)
    for coordinate in coordinates:
        key = mix(key ^ mix(np.array([coordinate], dtype=np.uint64)))
    return key


def uniforms(key: NDArray[np.uint64], indices: NDArray[np.int64], num_draws: int) -> NDArray[np.float64]:
    """(B, num_draws) numbers in [0, 1), those of row b a function of `key` and `indices[b]` alone."""
    rows = mix(key ^ mix(indices.astype(np.uint64)))
    draws = mix(rows[:, None] + GOLDEN_GAMMA * np.arange(1, num_draws + 1, dtype=np.uint64))
    return (draws >> np.uint64(11)).astype(np.float64) * 2.0**-53


def permutation(seed: int, epoch: int, length: int) -> NDArray[np.int64]:
    """The order (length,) in which one epoch visits the samples: sorted by a hash of seed, epoch and sample."""
    hashes = mix(stream_key(ORDER_STREAM, seed, epoch) ^ mix(np.arange(length, dtype=np.uint64)))
    return np.argsort(hashes)  # the hash is a bijection of the samples, so there are no ties to break
