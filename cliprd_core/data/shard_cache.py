"""Copies of remote shards on this machine's disk: whole, verified, bounded in their total size, shared by all processes and jobs.

    NAME.tar          a copy; its time of modification is that of its last use
    NAME.SIZE.part    a download in progress, which counts with SIZE bytes from its start
    NAME.lock         held exclusively while NAME is downloaded; never removed, or two could hold "the" lock
    space.lock        held while room is made

Locks are `flock`, so the kernel drops those of a process that dies. A reader holds a shared lock on the copy itself while it has it
open; room is only made of copies on which an exclusive lock is to be had.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import logging
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from cliprd_core.data.shard_files import Descriptor, RemoteShard

log = logging.getLogger(__name__)

MAX_WAIT_FOR_ROOM_SECONDS = 300.0  # others' downloads must end, and their readers let go; below the time-out of gradient exchange
WAIT_SECONDS = 0.05
PAUSE_AFTER_FAILURE_SECONDS = 60.0
"""A shard that could not be fetched is not tried again for this long: each of its samples would wait for all the tries."""

Download = Callable[[RemoteShard, Path], None]
"""Writes a shard to a path, whole and verified, or raises OSError."""


class ShardCache:
    """A folder of copies.

    Args:
        folder: created where missing; any number of processes may use it, also on several machines if it is shared and has `flock`.
        max_bytes: what copies and downloads in progress may take together.
    """

    def __init__(self, folder: Path, max_bytes: int, download: Download) -> None:
        self._folder = folder
        self.max_bytes = max_bytes
        self._download = download
        self._failures: dict[str, tuple[float, str]] = {}  # identity: when by time.monotonic(), and why

    def fetch(self, shard: RemoteShard) -> Descriptor:
        """The copy, open and safe from eviction until the descriptor goes; downloaded by one process where there is none.

        Raises:
            OSError: it cannot be downloaded, or there is no room for it.
        """
        copy = self._folder / f"{_name(shard)}.tar"
        held = _open_copy(copy, shard.num_bytes)
        if held is not None:
            return held
        failed_at, reason = self._failures.get(shard.identity, (-PAUSE_AFTER_FAILURE_SECONDS, ""))
        if time.monotonic() - failed_at < PAUSE_AFTER_FAILURE_SECONDS:
            raise OSError(reason)
        self._folder.mkdir(parents=True, exist_ok=True)
        with _locked(copy.with_suffix(".lock")):
            held = _open_copy(copy, shard.num_bytes)  # another process may have fetched it meanwhile
            if held is not None:
                return held
            with _locked(self._folder / "space.lock"):
                copy.unlink(missing_ok=True)  # of the wrong length
            try:
                return self._fetch(shard, copy)
            except OSError as error:
                self._failures[shard.identity] = (time.monotonic(), str(error))
                raise

    def _fetch(self, shard: RemoteShard, copy: Path) -> Descriptor:
        for left in self._folder.glob(f"{copy.stem}.*.part"):  # by a process that died
            left.unlink()
        part = copy.with_suffix(f".{shard.num_bytes}.part")
        self._reserve(part, shard.num_bytes)
        try:
            self._download(shard, part)
            held = Descriptor(part, is_held=True)  # before it can be seen, so that it cannot be evicted unread
            part.replace(copy)
        finally:
            part.unlink(missing_ok=True)
        held.path = copy
        return held

    def _reserve(self, part: Path, num_bytes: int) -> None:
        """Make room for a download and count it from now on."""
        if num_bytes > self.max_bytes:
            raise OSError(
                f"it has {num_bytes:,} bytes, and the cache of shards may hold {self.max_bytes:,}; raise CLIPRD_SHARD_CACHE_BYTES"
            )
        deadline = time.monotonic() + MAX_WAIT_FOR_ROOM_SECONDS
        while True:
            with _locked(self._folder / "space.lock"):
                excess = self._num_bytes_downloading() + num_bytes - self.max_bytes
                if self._evict_down_to(-excess):
                    part.touch()
                    return
            if time.monotonic() > deadline:
                raise OSError(f"the cache of shards in {self._folder} is full of shards in use; raise CLIPRD_SHARD_CACHE_BYTES")
            time.sleep(WAIT_SECONDS)

    def _num_bytes_downloading(self) -> int:
        total = 0
        for part in self._folder.glob("*.part"):
            name, size, _ = part.name.split(".")
            with _lock_at_once(self._folder / f"{name}.lock") as is_abandoned:
                if is_abandoned:
                    part.unlink(missing_ok=True)
                else:
                    total += int(size)
        return total

    def _evict_down_to(self, max_bytes: int) -> bool:
        """Remove the copies that were used longest ago until the rest have `max_bytes`; False where too many are in use."""
        copies = [(copy, copy.stat()) for copy in self._folder.glob("*.tar")]
        total = sum(status.st_size for _, status in copies)
        for copy, _ in sorted(copies, key=lambda one: one[1].st_mtime_ns):
            if total <= max_bytes:
                break
            with _lock_at_once(copy) as is_unused:
                if is_unused:
                    total -= copy.stat().st_size
                    copy.unlink()
                    log.info("removed the copy %s to make room", copy)
        return total <= max_bytes


def _name(shard: RemoteShard) -> str:
    return hashlib.sha256(shard.identity.encode()).hexdigest()[:32]


def _open_copy(copy: Path, num_bytes: int) -> Descriptor | None:
    """The copy, held and marked as used; None where there is none, or not a whole one."""
    try:
        held = Descriptor(copy, is_held=True)
    except FileNotFoundError:
        return None
    return held if held.is_linked and held.mark_used() == num_bytes else None


@contextlib.contextmanager
def _locked(file: Path) -> Iterator[None]:
    """Hold the exclusive lock on a file, which is made where missing."""
    descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _lock_at_once(file: Path) -> Iterator[bool]:
    """The same for a file that exists, without waiting: whether the lock was to be had. It is held inside the `with` block."""
    descriptor = os.open(file, os.O_RDWR | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True
    finally:
        os.close(descriptor)
