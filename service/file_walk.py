"""Reads folders for one spec, within bounds: a pattern of a few characters can lead through a file server for hours."""

from __future__ import annotations

import glob
import os
import time
from collections.abc import Iterator
from fnmatch import fnmatchcase
from itertools import islice

MAX_ENTRIES = 500_000
"""Files and folders that the patterns and evaluation sets of one spec may lead to a look at."""
MAX_SECONDS = 30.0
"""That reading their folders may take."""


class TooMuchToWalkError(ValueError):
    """The spec leads to more looks than it may. The message says so of one of its fields."""


class FileWalk:
    """What one spec leads to: every folder entry that is read or compared with a pattern counts, also those that don't match."""

    def __init__(self, *, max_entries: int | None = None, max_seconds: float = MAX_SECONDS) -> None:
        self._max_entries = MAX_ENTRIES if max_entries is None else max_entries
        self._max_seconds = max_seconds
        self._num_entries = 0
        self._seconds = 0.0
        self._matches: dict[str, list[str]] = {}

    @property
    def is_used_up(self) -> bool:
        """Whether nothing more will be looked at."""
        return self._num_entries > self._max_entries or self._seconds > self._max_seconds

    def spend(self, num_entries: int, seconds: float = 0.0) -> None:
        """Count looks.

        Raises:
            TooMuchToWalkError: they are too many now, or have taken too long.
        """
        self._num_entries += num_entries
        self._seconds += seconds
        if self._num_entries > self._max_entries:
            raise TooMuchToWalkError(f"makes the files and folders that this spec has looked at more than {self._max_entries}")
        if self._seconds > self._max_seconds:
            raise TooMuchToWalkError(f"makes reading the folders of this spec take longer than {self._max_seconds:g} s")

    def entries(self, folder: str) -> Iterator[os.DirEntry[str]]:
        """What a folder holds; nothing where it can't be read.

        Raises:
            TooMuchToWalkError: as `spend`.
        """
        started = time.monotonic()
        try:
            found = os.scandir(folder)
        except OSError:
            return
        with found:
            while True:
                try:
                    entry = next(found, None)
                except OSError:
                    return
                self.spend(0 if entry is None else 1, time.monotonic() - started)
                if entry is None:
                    return
                yield entry
                started = time.monotonic()

    def matches(self, pattern: str, *, limit: int) -> list[str]:
        """The paths that an absolute glob names, sorted, as the standard library's `glob` finds them; at most `limit`. Asked again, they
        are those of the first time.

        Raises:
            TooMuchToWalkError: as `spend`.
        """
        if pattern not in self._matches:
            given = pattern.split("/")
            parts = [part for number, part in enumerate(given) if part != "**" or given[number - 1] != "**"]
            num_plain = next((number for number, part in enumerate(parts) if glob.has_magic(part)), len(parts) - 1)
            folder = "/".join(parts[:num_plain]) or "/"
            self._matches[pattern] = sorted(islice(self._below(folder, parts[num_plain:]), limit))
        return self._matches[pattern]

    def _below(self, folder: str, parts: list[str]) -> Iterator[str]:
        if not parts:
            yield folder
            return
        part, *rest = parts
        if part == "**":
            yield from self._at_any_depth(folder, rest)
        elif glob.has_magic(part):
            for entry in self.entries(folder):
                if fnmatchcase(entry.name, part) and (part[0] == "." or not _is_hidden(entry)) and (not rest or _is_folder(entry)):
                    yield from self._below(entry.path, rest)
        else:
            path = os.path.join(folder, part)  # noqa: PTH118  many
            self.spend(1)
            if os.path.lexists(path):
                yield from self._below(path, rest)

    def _at_any_depth(self, folder: str, rest: list[str]) -> Iterator[str]:
        yield from self._below(folder, rest)
        for entry in self.entries(folder):
            if _is_hidden(entry):
                continue
            if _is_folder(entry):
                yield from self._at_any_depth(entry.path, rest)
            elif not rest:
                yield entry.path


def _is_hidden(entry: os.DirEntry[str]) -> bool:
    return entry.name.startswith(".")


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:
        return False
