"""Rows of one teacher store file, each verified by a checksum that stands in a file beside it.

The row is written first and its checksum after it; a row counts as there only while the two agree. See `store_dir` for the format.
"""

from __future__ import annotations

import mmap
import os
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

SCAN_ROWS = 1 << 16
"""Rows looked at at once when all are."""


class RowFile:
    """An open pair of files. Forked processes may use it, too.

    Reading goes through memory maps, which forked processes share. Writing does not: on a full disk, a write to a mapped page that
    has no place yet kills the process, where pwrite raises ENOSPC.
    """

    def __init__(self, data_path: Path, checksum_path: Path, num_rows: int, width: int) -> None:
        self._num_rows = num_rows
        self._width = width
        self._data_file = os.open(data_path, os.O_RDWR)
        self._checksum_file = os.open(checksum_path, os.O_RDWR)
        self._map = mmap.mmap(self._data_file, 0, access=mmap.ACCESS_READ)
        self._map.madvise(mmap.MADV_RANDOM)  # else each row read from disk brings 128 kB of neighbours that are not wanted
        self._features: NDArray[np.int16] = np.frombuffer(self._map, np.int16).reshape(num_rows, width)
        self.checksums: NDArray[np.uint32] = np.frombuffer(mmap.mmap(self._checksum_file, 0, access=mmap.ACCESS_READ), np.uint32)
        self._first_absent = 0

    def close(self) -> None:
        os.close(self._data_file)
        os.close(self._checksum_file)
        del self._features, self.checksums, self._map  # the maps go with their last array

    def read(self, rows_b: NDArray[np.int64]) -> tuple[NDArray[np.int16], NDArray[np.bool_]]:
        """(b, D) bits of the features, zero where absent, and (b,) which are there."""
        expected_b = self.checksums[rows_b]
        filled = np.flatnonzero(expected_b)  # others are holes in the file, and are not touched
        features_bD = np.zeros((len(rows_b), self._width), dtype=np.int16)
        found_kD = self._features[rows_b[filled]]
        is_good = _checksums(found_kD) == expected_b[filled]
        present_b = np.zeros(len(rows_b), dtype=np.bool_)
        present_b[filled[is_good]] = True
        features_bD[filled[is_good]] = found_kD[is_good]
        return features_bD, present_b

    def write(self, rows_b: NDArray[np.int64], features_bD: NDArray[np.int16]) -> None:
        """Write (b, D) bits of features, which may replace others. OSError where the disk refuses; no row is half there then."""
        _write_rows(self._data_file, rows_b, features_bD)
        _write_rows(self._checksum_file, rows_b, _checksums(features_bD))

    def clear_damaged(self) -> int:
        """Make rows whose bytes aren't those that were written read as absent for good; how many there were."""
        num_damaged = 0
        self._map.madvise(mmap.MADV_SEQUENTIAL)
        for start in range(0, self._num_rows, SCAN_ROWS):
            rows = start + np.flatnonzero(self.checksums[start : start + SCAN_ROWS])
            damaged = rows[~self.read(rows)[1]]
            _write_rows(self._checksum_file, damaged, np.zeros(len(damaged), dtype=np.uint32))
            num_damaged += len(damaged)
        self._map.madvise(mmap.MADV_RANDOM)
        self._first_absent = 0
        return num_damaged

    def is_complete(self) -> bool:
        """Whether every row has a checksum."""
        while self._first_absent < self._num_rows:
            chunk = self.checksums[self._first_absent : self._first_absent + SCAN_ROWS]
            absent = np.flatnonzero(chunk == 0)
            if absent.size:
                self._first_absent += int(absent[0])
                return False
            self._first_absent += len(chunk)
        return True


def _checksums(rows_bD: NDArray[np.int16]) -> NDArray[np.uint32]:
    """(b,) CRC-32 of each row's bytes, never 0."""
    checksums_b = np.fromiter(map(zlib.crc32, rows_bD), dtype=np.uint32, count=len(rows_bD))
    checksums_b[checksums_b == 0] = 1
    return checksums_b


def _write_rows(file: int, rows_b: NDArray[np.int64], values: NDArray[np.int16] | NDArray[np.uint32]) -> None:
    """Write each of `values` (b, …) at its row of the file."""
    for row, value in zip(rows_b.tolist(), values, strict=True):
        content = value.tobytes()
        offset = row * len(content)
        while content:  # pwrite may stop half-way at the edge of a full disk; the next call then says why
            written = os.pwrite(file, content, offset)
            content, offset = content[written:], offset + written
