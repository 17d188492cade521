"""Members of the samples of several shards, by one running number."""

from __future__ import annotations

import functools
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate

from cliprd_core.data.errors import CorruptSampleError
from cliprd_core.data.shard_files import Descriptor, Shard
from cliprd_core.data.shard_index import ShardIndex

MAX_OPEN_SHARDS = 64
"""File descriptors kept open by one process; far below the usual limit of 1024."""


class ShardReader:
    """Reads members of the samples of tar shards, numbered through; a few local shards stay open."""

    def __init__(self, shards: Sequence[ShardIndex]) -> None:
        self._shards = list(shards)
        self._ends = list(accumulate(len(shard) for shard in shards))
        self._opened = functools.lru_cache(maxsize=MAX_OPEN_SHARDS)(_open)

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def locate(self, index: int) -> tuple[ShardIndex, int]:
        """The shard that holds sample `index`, and the sample's row in it."""
        number = bisect_right(self._ends, index)
        return self._shards[number], index - (self._ends[number - 1] if number else 0)

    def key(self, index: int) -> str:
        shard, row = self.locate(index)
        return f"{shard.shard}:{shard.keys[row]}"

    def read(self, index: int, *kinds: str) -> list[bytes]:
        """The members of `kinds` (`images`, `captions`, `labels`) of sample `index`, which must have them.

        Raises:
            CorruptSampleError: the shard has shrunk, vanished, or cannot be read or fetched.
        """
        shard, row = self.locate(index)
        try:
            opened = self._opened(shard.shard) if shard.shard.stays_open else shard.shard.open()
            spans = [getattr(shard, kind) for kind in kinds]
            return [opened.read(int(span.offsets[row]), int(span.sizes[row])) for span in spans]
        except (OSError, EOFError) as error:
            raise CorruptSampleError(self.key(index), f"cannot read it: {error}") from error


def _open(shard: Shard) -> Descriptor:
    return shard.open()
