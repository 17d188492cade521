"""Captions to token ids, with a cache for data sets that fit it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from open_clip.tokenizer import SimpleTokenizer
from torch import Tensor

from cliprd_core.data.batch import ModelInput, Tokenizer

MAX_CACHED_CAPTIONS = 65_536
"""Per process and tokenizer: 20 MB at 77 tokens. Tokenising takes as long as decoding a 64-pixel image, so it pays for small sets;
large sets have large images, beside which it does not show."""


class TokenCache:
    """Tokenises the captions of numbered samples, remembering the ids of the first MAX_CACHED_CAPTIONS of them."""

    def __init__(self, model_input: ModelInput, num_samples: int) -> None:
        self._tokenizer = model_input.tokenizer
        capacity = min(num_samples, MAX_CACHED_CAPTIONS)
        # Never written until used, so an idle cache occupies no memory.
        self._ids = np.empty((capacity, model_input.context_length), dtype=np.int32)
        self._known = np.zeros(capacity, dtype=np.bool_)

    def tokenise(self, indices: Sequence[int], captions: Sequence[str]) -> Tensor:
        """Token ids (B, context_length) int64 of `captions`, which belong to samples `indices`."""
        rows = np.asarray(indices)
        cacheable = rows < len(self._known)
        found = cacheable.copy()
        found[cacheable] = self._known[rows[cacheable]]
        ids = np.empty((len(rows), self._ids.shape[1]), dtype=np.int64)
        ids[found] = self._ids[rows[found]]
        missing = np.flatnonzero(~found)
        if len(missing):
            ids[missing] = self._tokenizer([captions[row] for row in missing.tolist()]).numpy()
            fresh = missing[cacheable[missing]]
            self._ids[rows[fresh]] = ids[fresh]
            self._known[rows[fresh]] = True
        return torch.from_numpy(ids)


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
