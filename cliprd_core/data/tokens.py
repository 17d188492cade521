"""Captions to token ids, with a cache for data sets that fit it."""

from __future__ import annotations

import mmap
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from open_clip.tokenizer import SimpleTokenizer
from torch import Tensor

from cliprd_core.data.batch import ModelInput, Tokenizer

MAX_CACHE_BYTES = 512 * 1024**2
"""Per tokenizer and training process, whatever the number of its loader processes: 1.7 million captions of 77 tokens. Tokenising one
takes about as long as decoding a 64-pixel image, 5 % of what a photograph does."""


class TokenCache:
    """Tokenises the captions of numbered samples, remembering the ids of the first of them, as many as MAX_CACHE_BYTES hold.

    Processes that are forked from the one that made it share what any of them finds. Memory is taken as it is used.
    """

    def __init__(self, model_input: ModelInput, num_samples: int) -> None:
        self._tokenizer = model_input.tokenizer
        width = model_input.context_length
        self._capacity = min(num_samples, MAX_CACHE_BYTES // (4 * (width + 1)))
        # A row is a caption's ids and their sum plus one: a row that another process has written in part is not taken for whole.
        self._rows = np.frombuffer(mmap.mmap(-1, max(1, self._capacity) * 4 * (width + 1)), dtype=np.int32).reshape(-1, width + 1)

    def tokenise(self, indices: Sequence[int], captions: Sequence[str]) -> Tensor:
        """Token ids (B, context_length) int64 of `captions`, which belong to samples `indices`."""
        numbers = np.asarray(indices)
        cached = np.flatnonzero(numbers < self._capacity)
        rows = self._rows[numbers[cached]]
        is_whole = (rows[:, -1] != 0) & (rows[:, -1] == _check(rows[:, :-1]))
        ids = np.empty((len(numbers), self._rows.shape[1] - 1), dtype=np.int64)
        ids[cached[is_whole]] = rows[is_whole, :-1]
        is_missing = np.ones(len(numbers), dtype=np.bool_)
        is_missing[cached[is_whole]] = False
        missing = np.flatnonzero(is_missing)
        if len(missing):
            ids[missing] = self._tokenizer([captions[row] for row in missing.tolist()]).numpy()
            fresh = missing[numbers[missing] < self._capacity]
            self._rows[numbers[fresh], :-1] = ids[fresh]
            self._rows[numbers[fresh], -1] = _check(self._rows[numbers[fresh], :-1])
        return torch.from_numpy(ids)


def _check(ids: NDArray[np.int32]) -> NDArray[np.int32]:
    """(n, context_length) to (n,): never 0 for ids that are not negative and below 2^31 in sum."""
    checks: NDArray[np.int32] = ids.sum(axis=1, dtype=np.int32) + np.int32(1)
    return checks


def same_tokens(first: ModelInput, second: ModelInput) -> bool:
    """Whether the two surely tokenise alike. False where it cannot be told, which costs time but is never wrong."""
    if first.context_length != second.context_length:
        return False
    return first.tokenizer is second.tokenizer or _same_simple_tokenizer(first.tokenizer, second.tokenizer)


def _same_simple_tokenizer(first: Tokenizer, second: Tokenizer) -> bool:
    if type(first) is not SimpleTokenizer or type(second) is not SimpleTokenizer:
        return False
    names = ("context_length", "clean_fn", "reduction_fn", "encoder", "bpe_ranks")
    return all(getattr(first, name) == getattr(second, name) for name in names)
