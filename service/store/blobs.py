"""The bytes of artifacts, in a local folder that the API and its workers share."""

from __future__ import annotations

import hashlib
import os
import re
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from cliprd_core.run_dir import sync_directory

_CHUNK_BYTES = 1 << 20
_KEY = re.compile(r"[0-9a-f]{2}/[0-9a-f]{32}")


@dataclass(frozen=True)
class StoredBlob:
    """Bytes in the store."""

    key: str
    num_bytes: int
    sha256: str
    """Lower-case hexadecimal."""


class BlobStore:
    """Files under `root`, named by keys that the store makes up itself; a client's input never becomes a path."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def put_file(self, source: Path) -> StoredBlob:
        """Copy a file in, streamed. After a crash there is the whole blob or none.

        Raises:
            OSError: the source can't be read, or the store not written.
        """
        name = uuid.uuid4().hex
        key = f"{name[:2]}/{name}"
        target = self.root / key
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_suffix(".tmp")
        try:
            num_bytes, sha256 = _copy(source, temporary)
            temporary.replace(target)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        sync_directory(target.parent)
        return StoredBlob(key=key, num_bytes=num_bytes, sha256=sha256)

    def path(self, key: str) -> Path:
        """Where the bytes lie.

        Raises:
            ValueError: the key is not one of this store's making.
        """
        if not _KEY.fullmatch(key):
            raise ValueError(f"{key!r} is no key of the blob store")
        return self.root / key

    def open(self, key: str) -> BinaryIO:
        """The bytes, as a file opened for reading."""
        return self.path(key).open("rb")

    def delete(self, key: str) -> None:
        """Forget the bytes; a key without any is fine, so that a deletion can be repeated."""
        self.path(key).unlink(missing_ok=True)

    def check_writable(self) -> None:
        """Raises:
        OSError: nothing can be written under the root.
        """
        self.root.mkdir(parents=True, exist_ok=True)
        probe = self.root / f".probe-{uuid.uuid4().hex}"
        probe.touch()
        probe.unlink()


def _copy(source: Path, target: Path) -> tuple[int, str]:
    digest = hashlib.sha256()
    num_bytes = 0
    with source.open("rb") as reader, target.open("xb") as writer:
        while chunk := reader.read(_CHUNK_BYTES):
            digest.update(chunk)
            num_bytes += writer.write(chunk)
        writer.flush()
        os.fsync(writer.fileno())
    return num_bytes, digest.hexdigest()
