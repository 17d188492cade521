"""What can be wrong with data, as exceptions."""

from __future__ import annotations


class InvalidDataError(ValueError):
    """The data cannot be used: files missing, a column absent, nothing readable, too few pairs. The message says what to do."""


class CorruptSampleError(Exception):
    """One pair cannot be read or decoded; the loader counts it and takes the next one.

    Attributes:
        key: which pair, for people: `SHARD:KEY` or the image's path.
        reason: what is wrong with it.
    """

    def __init__(self, key: str, reason: str) -> None:
        super().__init__(key, reason)
        self.key = key
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.key}: {self.reason}"
