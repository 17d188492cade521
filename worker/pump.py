"""Copies the records a run appends to its files, and its log, into the store, surviving times when the store is out of reach."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Generic

from cliprd_core.run_dir import AnyRecord, read_records

logger = logging.getLogger(__name__)

MIN_BATCH, MAX_BATCH = 50, 500
"""Records that are written at once, at most. Below the first of them, what a transaction takes whatever it writes outweighs the records."""
MAX_LOG_CHUNK_BYTES = 64 * 1024
LOG_PAUSE_SECONDS = 1.0
LOG_OFFSET_SUFFIX = ".pumped"
"""Of the file beside the log that says how many of its bytes are in the store."""
FIRST_RETRY_SECONDS = 0.5
MAX_RETRY_SECONDS = 10.0


class Retry:
    """When to try again after the store was out of reach: later and later, up to a limit."""

    def __init__(self, retriable: tuple[type[Exception], ...]) -> None:
        self._retriable = retriable
        self._seconds = FIRST_RETRY_SECONDS
        self._not_before = 0.0

    def is_due(self) -> bool:
        return time.monotonic() >= self._not_before

    def run(self, write: Callable[[], None]) -> bool:
        """True if it was written; False if the store is out of reach."""
        try:
            write()
        except self._retriable as error:
            logger.warning("the store is out of reach (%s); trying again in %.1f s", type(error).__name__, self._seconds)
            self._not_before = time.monotonic() + self._seconds
            self._seconds = min(2 * self._seconds, MAX_RETRY_SECONDS)
            return False
        self._seconds = FIRST_RETRY_SECONDS
        return True


class RecordPump(Generic[AnyRecord]):
    """One file's records, in order, in batches. What could not be written stays in the file, so no buffer can overflow.

    It starts at the beginning of the file: an earlier attempt on this machine may have died before its last records were written,
    and writing a record twice is harmless.

    Args:
        path: The file, which need not exist yet.
        kind: Type of its records.
        write: Writes a batch to the store. Errors in `retriable` are tried again later, all others pass through.
    """

    def __init__(
        self,
        path: Path,
        kind: type[AnyRecord],
        write: Callable[[Sequence[AnyRecord]], None],
        retriable: tuple[type[Exception], ...],
    ) -> None:
        self._path = path
        self._kind = kind
        self._write = write
        self._offset = 0
        self._batch_size = MAX_BATCH
        self._retry = Retry(retriable)

    def pump(self) -> bool:
        """Write the next batch; True if there may be more to write at once.

        What fails is tried again in half the size: on a bad network a small transaction gets through more often, and what waits grows.
        """
        if not self._retry.is_due():
            return False
        batch = list(islice(read_records(self._path, self._kind, self._offset), self._batch_size))
        if not batch:
            return False
        if not self._retry.run(lambda: self._write([record for record, _ in batch])):
            self._batch_size = max(MIN_BATCH, len(batch) // 2)
            return False
        self._offset = batch[-1][1]
        is_full = len(batch) == self._batch_size
        self._batch_size = min(2 * self._batch_size, MAX_BATCH)
        return is_full

    def is_drained(self) -> bool:
        """Whether every whole record of the file has been written."""
        return next(iter(read_records(self._path, self._kind, self._offset)), None) is None


class LogPump:
    """A run's log, in whole lines, from where the last attempt on this machine left off, in a file beside it.

    Every byte gets to the store. A worker that is killed between writing there and taking a note of it has a chunk written twice.

    Args:
        path: The file, which need not exist yet.
        write: Adds text to the log in the store.
        retriable: Errors of `write` that are tried again later.
    """

    def __init__(self, path: Path, write: Callable[[str], None], retriable: tuple[type[Exception], ...]) -> None:
        self._path = path
        self._write = write
        self._offset_path = path.with_name(path.name + LOG_OFFSET_SUFFIX)
        self._offset: int | None = None  # not before the first look, when no other attempt pumps it any more
        self._retry = Retry(retriable)
        self._pumped_at = 0.0

    def pump(self) -> None:
        """Write what is new, once in a while, since every write is a row."""
        if time.monotonic() - self._pumped_at >= LOG_PAUSE_SECONDS:
            self._pump(is_final=False)

    def drain(self) -> bool:
        """After the run's end: write the rest, an unfinished line included. True once all of it is written."""
        return not self._pump(is_final=True)

    def _pump(self, *, is_final: bool) -> bool:
        """Whether there may be more to write."""
        if not self._retry.is_due():
            return True
        self._pumped_at = time.monotonic()
        if self._offset is None:
            self._offset = self._read_offset()
        chunk = self._next_chunk(self._offset, is_final)
        if not chunk:
            return False
        if self._retry.run(lambda: self._write(chunk.decode(errors="replace"))):
            self._offset += len(chunk)
            self._note_offset(self._offset)
        return True

    def _next_chunk(self, offset: int, is_final: bool) -> bytes:
        if not self._path.exists():
            return b""
        with self._path.open("rb") as log:
            log.seek(offset)
            chunk = log.read(MAX_LOG_CHUNK_BYTES)
        whole_lines = chunk[: chunk.rfind(b"\n") + 1]
        return whole_lines or (chunk if is_final or len(chunk) == MAX_LOG_CHUNK_BYTES else b"")

    def _read_offset(self) -> int:
        try:
            return int(self._offset_path.read_text())
        except (OSError, ValueError):  # none yet, or unreadable after a power failure: better twice than never
            return 0

    def _note_offset(self, offset: int) -> None:
        """Not flushed to the disk, as it need not outlive the machine's crash; and a full disk is no reason to stop the run."""
        temporary = self._offset_path.with_name(f".{self._offset_path.name}.tmp")
        with suppress(OSError):
            temporary.write_text(str(offset))
            temporary.replace(self._offset_path)
