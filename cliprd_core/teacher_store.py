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
import os
import time
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
from cliprd_core.store_rows import RowFile

logger = logging.getLogger(__name__)

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}
USAGE_SECONDS = 30.0
"""Pause between a process's entries in usage.json."""
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
        self._images = RowFile(folder / IMAGES_FILE, folder / IMAGE_CHECKSUMS_FILE, key.num_views * key.num_samples, key.width)
        self._texts = RowFile(folder / TEXTS_FILE, folder / TEXT_CHECKSUMS_FILE, key.num_samples, key.width)
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

    def _read(self, rows: RowFile, rows_b: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        features_bD, present_b = rows.read(rows_b)
        num_hits = int(present_b.sum())
        self._note_usage(hits=num_hits, misses=len(present_b) - num_hits)
        return torch.from_numpy(features_bD).view(self._dtype), torch.from_numpy(present_b)

    def _write(self, rows: RowFile, rows_b: NDArray[np.int64], features_bD: Tensor) -> None:
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
