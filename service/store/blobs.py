"""The bytes of artifacts: in a local folder that the API and its workers share, or in S3."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from io import BufferedRandom
from pathlib import Path
from typing import BinaryIO, Protocol

from cliprd_core.run_dir import sync_directory

CHUNK_BYTES = 1 << 20
TEMPORARY_SUFFIX = ".tmp"
REFUSED_ERRNOS = (errno.EACCES, errno.EPERM, errno.EROFS)
"""What the system says where rights are missing, or a file system is mounted to be read only."""
_KEY = re.compile(r"[0-9a-f]{2}/[0-9a-f]{32}")


class BlobsUnreachableError(OSError):
    """The store does not answer, or not as it should; it may another time."""


class BlobsRefusedError(BlobsUnreachableError):
    """The store answers that it won't: it will not either until somebody mends its settings or rights. The message says what to do."""


@dataclass(frozen=True)
class StoredBlob:
    """Bytes in the store."""

    key: str
    num_bytes: int
    sha256: str
    """Lower-case hexadecimal."""


class Blobs(Protocol):
    """Where the bytes of artifacts lie. Keys are the store's own; a client's input never becomes one."""

    def put_file(self, source: Path, key: str | None = None) -> StoredBlob:
        """Copy a file in, and make sure that the store has what was read. After a crash there is the whole blob or none.

        Args:
            source: The file.
            key: Of `new_key`, for those who note it before; a new one by default.

        Raises:
            OSError: the source can't be read, or the store not written.
        """
        ...

    def num_bytes(self, key: str) -> int:
        """
        Raises:
            FileNotFoundError: there are no such bytes.
        """
        ...

    def stream(self, key: str, start: int = 0, num_bytes: int | None = None) -> Iterator[bytes]:
        """The bytes from `start` on, to the end or `num_bytes` of them, in chunks.

        Raises:
            FileNotFoundError: there are no such bytes; raised before the first chunk is asked for.
        """
        ...

    def delete(self, key: str) -> None:
        """Forget the bytes, and what an upload under this key that was killed left; a key without any is fine, so that a deletion can be
        repeated."""
        ...

    def check_writable(self) -> None:
        """
        Raises:
            OSError: nothing can be written there.
        """
        ...


def make_blobs(artifacts_url: str, artifacts_root: Path, *, is_quick: bool = False) -> Blobs:
    """The store of the settings: `artifacts_url` (S3) if it is given, else the folder.

    `is_quick`: a store that says nothing is given up soon, for what is tried again anyway.

    Raises:
        ValueError: the address is no `s3://BUCKET/PREFIX`, or the extra `s3` is not installed.
    """
    if not artifacts_url:
        return BlobStore(artifacts_root)
    from service.store.s3_blobs import S3BlobStore

    return S3BlobStore(artifacts_url, is_quick=is_quick)


def new_key() -> str:
    """A key that no other blob has."""
    name = uuid.uuid4().hex
    return f"{name[:2]}/{name}"


def check_key(key: str) -> None:
    """
    Raises:
        ValueError: the key is not one of a store's making.
    """
    if not _KEY.fullmatch(key):
        raise ValueError(f"{key!r} is no key of the blob store")


class BlobStore:
    """Files under `root`."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def put_file(self, source: Path, key: str | None = None) -> StoredBlob:
        """As `Blobs`."""
        key = key or new_key()
        target = self.path(key)
        temporary = target.with_suffix(TEMPORARY_SUFFIX)
        with source.open("rb") as reader, self._refusing():
            try:
                with self._new_file(temporary) as copy:
                    num_bytes, sha256 = _copy(reader, copy)
                temporary.replace(target)
            except BaseException:
                temporary.unlink(missing_ok=True)
                raise
            sync_directory(target.parent)
        return StoredBlob(key=key, num_bytes=num_bytes, sha256=sha256)

    def _new_file(self, path: Path) -> BufferedRandom:
        """A new file, and its folder where that is missing: a deletion may take the empty folder away just before the file is in it."""
        while True:
            try:
                return path.open("xb+")
            except FileNotFoundError:
                self.root.mkdir(parents=True, exist_ok=True)
                with suppress(FileExistsError):
                    path.parent.mkdir()
                    sync_directory(self.root)

    def path(self, key: str) -> Path:
        """Where the bytes lie.

        Raises:
            ValueError: the key is not one of this store's making.
        """
        check_key(key)
        return self.root / key

    def num_bytes(self, key: str) -> int:
        """As `Blobs`."""
        with self._refusing():
            return self.path(key).stat().st_size

    def stream(self, key: str, start: int = 0, num_bytes: int | None = None) -> Iterator[bytes]:
        """As `Blobs`."""
        with self._refusing():
            return _chunks(self.path(key).open("rb"), start, num_bytes)

    def delete(self, key: str) -> None:
        """As `Blobs`."""
        path = self.path(key)
        with self._refusing():
            path.with_suffix(TEMPORARY_SUFFIX).unlink(missing_ok=True)
            path.unlink(missing_ok=True)
        with suppress(OSError):
            path.parent.rmdir()  # which fails where anything is in it

    def check_writable(self) -> None:
        """As `Blobs`."""
        with self._refusing():
            self.root.mkdir(parents=True, exist_ok=True)
            probe = self.root / f".probe-{uuid.uuid4().hex}"
            probe.touch()
            probe.unlink()

    @contextmanager
    def _refusing(self) -> Iterator[None]:
        """Rights that are missing here as the store's refusal: what trained waits until somebody has mended them."""
        try:
            yield
        except OSError as error:
            if error.errno not in REFUSED_ERRNOS:
                raise
            where = self.root if error.filename is None else error.filename
            raise BlobsRefusedError(
                f"{where}: {error.strerror}. Give the user that cliprd runs as (uid {os.geteuid()}) the right to read and write the"
                f" artifact folder {self.root} and all that is in it."
            ) from error


def _chunks(file: BinaryIO, start: int, num_bytes: int | None) -> Iterator[bytes]:
    with file:
        file.seek(start)
        left = num_bytes
        while left != 0:
            chunk = file.read(CHUNK_BYTES if left is None else min(left, CHUNK_BYTES))
            if not chunk:
                return
            left = None if left is None else left - len(chunk)
            yield chunk


def _copy(source: BinaryIO, copy: BufferedRandom) -> tuple[int, str]:
    """
    Raises:
        OSError: also when the copy does not read back as it was written.
    """
    digest = hashlib.sha256()
    num_bytes = 0
    while chunk := source.read(CHUNK_BYTES):
        digest.update(chunk)
        num_bytes += copy.write(chunk)
    copy.flush()
    os.fsync(copy.fileno())
    os.posix_fadvise(copy.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)  # read from the disk where that is possible, not from memory
    copy.seek(0)
    if hashlib.file_digest(copy, "sha256").digest() != digest.digest():
        raise OSError(f"{copy.name} does not read back as it was written; is the disk faulty?")
    return num_bytes, digest.hexdigest()
