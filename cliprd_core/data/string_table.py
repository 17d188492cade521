"""Millions of strings in two flat buffers."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray


class StringTable:
    """An immutable list of strings, held as UTF-8 bytes and offsets.

    A list of str would be several times larger, and forked loader processes would each copy it page by page, because reading a
    Python object writes its reference count.
    """

    def __init__(self, blob: NDArray[np.uint8], offsets: NDArray[np.int64]) -> None:
        self.blob = blob  # (total bytes,)
        self.offsets = offsets  # (len + 1,): string i is blob[offsets[i]:offsets[i + 1]]

    @classmethod
    def from_strings(cls, strings: Iterable[str]) -> StringTable:
        blob = bytearray()
        offsets = [0]
        for string in strings:
            blob += string.encode("utf-8", "surrogateescape")  # file names need not be valid UTF-8
            offsets.append(len(blob))
        return cls(np.frombuffer(bytes(blob), dtype=np.uint8), np.array(offsets, dtype=np.int64))

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> str:
        start, stop = int(self.offsets[index]), int(self.offsets[index + 1])
        return self.blob[start:stop].tobytes().decode("utf-8", "surrogateescape")
