"""One tar shard as a file to read from, wherever it comes from."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from cliprd_core.data.errors import InvalidDataError


class Descriptor:
    """A file open for `os.pread`, closed when its last user lets go, so that a cache may drop it while a thread still reads."""

    def __init__(self, path: Path, *, is_held: bool = False) -> None:
        """With `is_held`, the file carries a shared lock while it is open (see `shard_cache`)."""
        self.path = path
        self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        if is_held:
            fcntl.flock(self._descriptor, fcntl.LOCK_SH)

    @property
    def is_linked(self) -> bool:
        """Whether the file still has its name; False once it was removed."""
        return os.fstat(self._descriptor).st_nlink > 0

    def mark_used(self) -> int:
        """Set the file's time of modification to now; returns its size in bytes."""
        os.utime(self._descriptor)
        return os.fstat(self._descriptor).st_size

    def read(self, offset: int, size: int) -> bytes:
        """`size` bytes from `offset` on. Positional, so threads and forked processes do not disturb one another.

        Raises:
            EOFError: the file is shorter than that.
        """
        chunks = []
        while size > 0:
            chunk = os.pread(self._descriptor, size, offset)
            if not chunk:
                raise EOFError(f"the file ends at byte {offset:,}")
            chunks.append(chunk)
            offset += len(chunk)
            size -= len(chunk)
        return chunks[0] if len(chunks) == 1 else b"".join(chunks)

    def __del__(self) -> None:
        if hasattr(self, "_descriptor"):  # opening may have failed
            os.close(self._descriptor)


class Shard(Protocol):
    """A tar whose bytes can be had."""

    def __hash__(self) -> int: ...

    @property
    def num_bytes(self) -> int: ...

    @property
    def identity(self) -> str:
        """Changes whenever the content may have: the key of what is remembered of the shard on this machine."""
        ...

    @property
    def stays_open(self) -> bool:
        """Whether readers may keep it open; False for a cached copy, which nobody could remove then."""
        ...

    def open(self) -> Descriptor:
        """
        Raises:
            OSError: it cannot be opened, or fetched.
        """
        ...

    def __str__(self) -> str:
        """Its name, for people."""
        ...


@dataclass(frozen=True)
class LocalShard:
    """A file on a disk of this machine, or mounted here."""

    path: Path
    num_bytes: int
    modified_ns: int
    stays_open = True

    @classmethod
    def find(cls, path: Path) -> LocalShard:
        """
        Raises:
            InvalidDataError: there is no such file.
        """
        try:
            status = path.stat()
        except OSError as error:
            raise InvalidDataError(f"cannot read shard {path}: {error.strerror}; check the path in `shards`") from error
        return cls(path, status.st_size, status.st_mtime_ns)

    @property
    def identity(self) -> str:
        return f"{self.path.resolve()}\0{self.num_bytes}\0{self.modified_ns}"

    def open(self) -> Descriptor:
        return Descriptor(self.path)

    def __str__(self) -> str:
        return str(self.path)


@dataclass(frozen=True)
class RemoteShard:
    """An object behind `s3://` or `http(s)://`, read from a copy on this machine's disk."""

    url: str
    num_bytes: int
    version: str  # its ETag or date, as the server gave it; may be empty
    fetch: Callable[[RemoteShard], Descriptor]  # the copy, downloaded where there is none
    stays_open = False

    @property
    def identity(self) -> str:
        return f"{self.url}\0{self.num_bytes}\0{self.version}"

    def open(self) -> Descriptor:
        return self.fetch(self)

    def __str__(self) -> str:
        return without_secrets(self.url)


def without_secrets(url: str) -> str:
    """The URL less what may be a password: the user in front of the host, and the query."""
    scheme, _, rest = url.partition("://")
    host, slash, path = rest.partition("?")[0].partition("/")
    return f"{scheme}://{host.rpartition('@')[2]}{slash}{path}"
