"""What data is, as one hash: the same on every machine, in every folder and run, and another one when the data is another.

It rests on the layout of each shard (keys, places and sizes of all members) or the rows of each table, and on a bounded sample of
the bytes: the ends of up to NUM_SAMPLED images and captions a shard, evenly spread. It therefore misses a change that leaves every
size and name as it was and touches no sampled byte, such as other pixels in the middle of an image, or in an image between two
sampled ones. It notices added, removed, renamed and re-ordered pairs always, and a re-encoded or re-captioned set practically always.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

NUM_SAMPLED = 64
"""Pairs of one shard whose bytes are looked at."""

NUM_SAMPLED_FILES = 1024
"""Images of one table; it stands for many shards' worth of pairs."""

MAX_SAMPLED_BYTES = 4096
"""Of one image or caption: half from its start, half from its end, since photographs of one camera begin alike."""


class Fingerprint:
    """SHA-256 over parts whose borders count."""

    def __init__(self, kind: str) -> None:
        self._hash = hashlib.sha256()
        self.add(kind.encode())

    def add(self, part: bytes | memoryview) -> None:
        self._hash.update(len(part).to_bytes(8, "little"))
        self._hash.update(part)

    def add_number(self, number: int) -> None:
        self.add(str(number).encode())

    def add_array(self, array: NDArray[Any]) -> None:
        """Of whole numbers, in the byte order that all machines share."""
        self.add(np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<")).tobytes())

    def add_ends(self, num_bytes: int, read: Callable[[int, int], bytes]) -> None:
        """The size of some bytes and their ends, through `read(offset, size)`."""
        self.add_number(num_bytes)
        if num_bytes <= MAX_SAMPLED_BYTES:
            self.add(read(0, num_bytes))
        else:
            half = MAX_SAMPLED_BYTES // 2
            self.add(read(0, half))
            self.add(read(num_bytes - half, half))

    def add_content(self, content: bytes) -> None:
        """The size and the ends of what is at hand as a whole."""
        self.add_ends(len(content), lambda offset, size: content[offset : offset + size])

    def hexdigest(self) -> str:
        return self._hash.hexdigest()


def spread(count: int, most: int) -> list[int]:
    """Up to `most` different numbers below `count`, evenly spread, with the first and the last."""
    spaced: list[int] = np.unique(np.linspace(0, count - 1, num=min(count, most)).astype(np.int64)).tolist()
    return spaced


def joined_fingerprint(kind: str, fingerprints: Iterable[str]) -> str:
    joined = Fingerprint(kind)
    for fingerprint in fingerprints:
        joined.add(fingerprint.encode())
    return joined.hexdigest()
