"""The teacher store: features that a teacher computed once, kept on disk in two bytes a number for every later run to read.

    with open_store(root, key, teacher="ViT-B-16", data="cc3m") as store:
        features_bD, present_b = store.read_images(indices, view)
        if not present_b.all():
            rows = store.rounded(teacher(images))  # train on these: they are what a later epoch reads
            store.write_images(indices, view, rows)

Features are stored L2-normalised. Every term of the objective normalises the teacher's features anyway, so nothing is lost; float16
then never overflows, and its relative precision (2^-11) is the same for every teacher, however long its raw features are.

A row is written before its checksum, and a reader takes it only if the two agree. So a crash, a damaged disk or two runs that write
one row at once with different numbers can leave a row that reads as absent, and is computed again, but none that reads as wrong.
Which files there are stands in `store_dir`.
"""

from __future__ import annotations

import logging
import math
import mmap
import os
import time
import zlib
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from cliprd_core.store_dir import (
    IMAGE_CHECKSUMS_FILE,
    IMAGES_FILE,
    LOCK_FILE,
    TEXT_CHECKSUMS_FILE,
    TEXTS_FILE,
    StoreKey,
    StoreNotFoundError,
    add_usage,
    create_store,
    is_whole,
    lock_shared,
)
from cliprd_core.store_removal import delete_store

logger = logging.getLogger(__name__)

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}
USAGE_SECONDS = 30.0
"""Pause between a process's entries in usage.json."""
SCAN_ROWS = 1 << 16
NUM_OPEN_TRIES = 10

Indices = NDArray[np.int64] | Tensor
"""(b,) positions in the training set, on the CPU."""


def open_store(root: Path, key: StoreKey, *, teacher: str, data: str) -> TeacherStore:
    """The store of `key` under `root`, made where there is none; it can't be removed until it is closed. Any number of processes at once.

    Args:
        teacher, data: names for people, shown in lists of stores.

    Raises:
        StoreInUseError: its files are damaged, and another run uses them.
        OSError: it can't be made or opened; ENOSPC where the disk is full.
    """
    folder = root / key.digest
    for _ in range(NUM_OPEN_TRIES):
        lock = lock_shared(folder)
        if lock is not None:
            if is_whole(folder, key):
                return TeacherStore(folder, key, lock)
            os.close(lock)
        if lock is not None or (folder.is_dir() and not (folder / LOCK_FILE).exists()):
            logger.warning("the teacher store %s is damaged and is started anew", folder)
            _delete(root, key)
        create_store(root, key, teacher=teacher, data=data)
    raise OSError(f"the teacher store {folder} is removed as often as it is made; look at what deletes it")


def _delete(root: Path, key: StoreKey) -> None:
    try:
        delete_store(root, key.digest)
    except StoreNotFoundError:
        return  # another process was first


class _Rows:
    """One file of features with its file of checksums. Rows are numbered through all views.

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
        found_D = self._features[rows_b[filled]]
        is_good = _checksums(found_D) == expected_b[filled]
        present_b = np.zeros(len(rows_b), dtype=np.bool_)
        present_b[filled[is_good]] = True
        features_bD[filled[is_good]] = found_D[is_good]
        return features_bD, present_b

    def write(self, rows_b: NDArray[np.int64], features_bD: NDArray[np.int16]) -> None:
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


class TeacherStore:
    """An open store; see the module. Safe to use from any number of processes, forked ones included. Closed by `close` or `with`.

    Attributes:
        key: What its features depend on.
        is_writable: False once writing has failed, as on a full disk: there has been a warning, and rows are dropped from then on.
    """

    def __init__(self, folder: Path, key: StoreKey, lock: int) -> None:
        """As `open_store` does it, which is the way to have one. `lock` is the descriptor of `lock_shared`."""
        self.key = key
        self.is_writable = True
        self._folder = folder
        self._lock = lock
        self._dtype = DTYPES[key.dtype]
        self._images = _Rows(folder / IMAGES_FILE, folder / IMAGE_CHECKSUMS_FILE, key.num_views * key.num_samples, key.width)
        self._texts = _Rows(folder / TEXTS_FILE, folder / TEXT_CHECKSUMS_FILE, key.num_samples, key.width)
        self._pid = os.getpid()
        self._hits = self._misses = 0
        self._noted_at = -math.inf
        self._note_usage()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the store; not to be used afterwards."""
        self._note_usage(is_last=True)
        self._images.close()
        self._texts.close()
        os.close(self._lock)  # forked processes that still have it keep the store; so it is closed, not unlocked

    def rounded(self, features_bD: Tensor) -> Tensor:
        """(b, D) features as a reader will get them: L2-normalised, in the stored dtype, on the same device.

        A step that has computed features trains on these, so that it sees the numbers that a later epoch or a resumed run reads.
        """
        return F.normalize(features_bD.float(), dim=-1).to(self._dtype)

    def read_images(self, indices: Indices, view: int) -> tuple[Tensor, Tensor]:
        """Features of images.

        Args:
            indices: (b,) positions of the pairs.
            view: Which of the key's `num_views` crops, from 0.

        Returns:
            (b, D) features in the stored dtype, zero where absent; (b,) bool, which are there. Both on the CPU.
        """
        return self._read(self._images, self._image_rows(indices, view))

    def read_texts(self, indices: Indices) -> tuple[Tensor, Tensor]:
        """Features of captions; see `read_images`."""
        return self._read(self._texts, self._positions(indices))

    def write_images(self, indices: Indices, view: int, features_bD: Tensor) -> None:
        """Keep what `rounded` returned, on any device. Never raises for the disk's sake: training goes on without the store.

        Rows with NaN or infinity are left out.

        Raises:
            ValueError: the features are not in the stored dtype.
        """
        self._write(self._images, self._image_rows(indices, view), features_bD)

    def write_texts(self, indices: Indices, features_bD: Tensor) -> None:
        """Keep features of captions; see `write_images`."""
        self._write(self._texts, self._positions(indices), features_bD)

    def is_complete(self) -> bool:
        """Whether every row has been written; cheap, since it goes on where the last call stopped. Damage shows when a row is read."""
        return self._texts.is_complete() and self._images.is_complete()

    def num_filled(self) -> tuple[int, int]:
        """Image and text rows that have been written, of `num_views * num_samples` and `num_samples`. Looks at every checksum."""
        return int(np.count_nonzero(self._images.checksums)), int(np.count_nonzero(self._texts.checksums))

    def verify(self) -> int:
        """Read every row, and clear those that are damaged; returns how many. Another run that writes meanwhile may lose a row by it.

        Raises:
            OSError: the store can't be read or written.
        """
        return self._images.clear_damaged() + self._texts.clear_damaged()

    def _image_rows(self, indices: Indices, view: int) -> NDArray[np.int64]:
        assert 0 <= view < self.key.num_views, f"there is no view {view}"
        return view * self.key.num_samples + self._positions(indices)

    def _positions(self, indices: Indices) -> NDArray[np.int64]:
        positions_b = np.asarray(indices)
        assert positions_b.size == 0 or (positions_b.min() >= 0 and positions_b.max() < self.key.num_samples), "there is no such pair"
        return positions_b

    def _read(self, rows: _Rows, rows_b: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        features_bD, present_b = rows.read(rows_b)
        num_hits = int(present_b.sum())
        self._note_usage(hits=num_hits, misses=len(present_b) - num_hits)
        return torch.from_numpy(features_bD).view(self._dtype), torch.from_numpy(present_b)

    def _write(self, rows: _Rows, rows_b: NDArray[np.int64], features_bD: Tensor) -> None:
        if features_bD.dtype is not self._dtype:
            raise ValueError(f"features: must be {self._dtype}, as `rounded` returns them, but are {features_bD.dtype}")
        assert features_bD.shape == (len(rows_b), self.key.width), features_bD.shape
        if not self.is_writable:
            return
        features_bD = features_bD.detach().cpu()
        finite = features_bD.isfinite().all(dim=-1).numpy()
        bits_bD = features_bD.contiguous().view(torch.int16).numpy()
        try:
            rows.write(rows_b[finite], bits_bD[finite])
        except OSError as error:
            self.is_writable = False
            logger.warning("the teacher store %s is filled no further: %s; training goes on without", self._folder, error.strerror)

    def _note_usage(self, *, hits: int = 0, misses: int = 0, is_last: bool = False) -> None:
        """Count, and add this process's counts to usage.json now and then, and at the end."""
        if os.getpid() != self._pid:  # just forked: the counts so far are the parent's
            self._pid, self._hits, self._misses, self._noted_at = os.getpid(), 0, 0, time.monotonic()
        self._hits, self._misses = self._hits + hits, self._misses + misses
        if time.monotonic() - self._noted_at < USAGE_SECONDS and not is_last:
            return
        self._noted_at = time.monotonic()
        try:
            if add_usage(self._folder, hits=self._hits, misses=self._misses, filled=self.num_filled(), wait=is_last):
                self._hits = self._misses = 0
        except OSError as error:
            self._noted_at = math.inf  # not again before the end
            logger.warning("the usage of the teacher store %s is not recorded: %s", self._folder, error.strerror)
