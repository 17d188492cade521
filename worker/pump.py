"""Copies the records a run appends to its files into the store, surviving times when the store is out of reach."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import Generic

from cliprd_core.run_dir import AnyRecord, read_records

logger = logging.getLogger(__name__)

MAX_BATCH = 500
FIRST_RETRY_SECONDS = 0.5
MAX_RETRY_SECONDS = 10.0


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
        self._retriable = retriable
        self._offset = 0
        self._retry_seconds = FIRST_RETRY_SECONDS
        self._not_before = 0.0

    def pump(self) -> bool:
        """Write the next batch; True if there may be more to write at once."""
        if time.monotonic() < self._not_before:
            return False
        batch = list(islice(read_records(self._path, self._kind, self._offset), MAX_BATCH))
        if not batch:
            return False
        try:
            self._write([record for record, _ in batch])
        except self._retriable as error:
            logger.warning("the store is out of reach (%s); trying again in %.1f s", type(error).__name__, self._retry_seconds)
            self._not_before = time.monotonic() + self._retry_seconds
            self._retry_seconds = min(2 * self._retry_seconds, MAX_RETRY_SECONDS)
            return False
        self._retry_seconds = FIRST_RETRY_SECONDS
        self._offset = batch[-1][1]
        return len(batch) == MAX_BATCH

    def is_drained(self) -> bool:
        """Whether every whole record of the file has been written."""
        return next(iter(read_records(self._path, self._kind, self._offset)), None) is None
