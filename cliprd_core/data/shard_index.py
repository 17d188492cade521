"""Random access into tar shards: where each sample's members lie, found once per tar and kept in a cache folder.

Members are named as `webdataset` names them: the key is the path up to the first dot of the file name, the rest is the extension.
`KEY.png|jpg|jpeg|webp` is the image, `KEY.txt` the caption, `KEY.cls` the class; everything else is passed over.
"""

from __future__ import annotations

import hashlib
import io
import logging
import os
import tarfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cliprd_core.data.errors import InvalidDataError
from cliprd_core.data.string_table import StringTable
from cliprd_core.run_dir import write_atomically

log = logging.getLogger(__name__)

FORMAT_VERSION = 1
"""Part of the cache key; raise it whenever what is stored, or what counts as a member, changes."""

IMAGE_EXTENSIONS = frozenset({"png", "jpg", "jpeg", "webp"})
COMPRESSION_MAGIC = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ\x00": "xz", b"\x28\xb5\x2f\xfd": "zstandard"}

ABSENT = -1
"""Offset of a member that a sample does not have."""


@dataclass(frozen=True)
class Spans:
    """Where one kind of member lies in its tar, per sample."""

    offsets: NDArray[np.int64]  # (N,) bytes from the start of the tar, or ABSENT
    sizes: NDArray[np.int64]  # (N,) bytes

    @property
    def present(self) -> NDArray[np.bool_]:
        present: NDArray[np.bool_] = self.offsets != ABSENT
        return present


@dataclass(frozen=True)
class ShardIndex:
    """The N samples of one tar that have an image, in the tar's order."""

    path: Path
    keys: StringTable
    images: Spans
    captions: Spans
    labels: Spans
    damage: str  # empty, or what is wrong with the tar; the samples before the damage are listed

    def __len__(self) -> int:
        return len(self.keys)


def load_shard_index(path: Path, cache_dir: Path | None = None) -> ShardIndex:
    """The index of one tar: from the cache, else by walking the tar's headers (and then cached).

    Safe for several processes at once: each may build the same index, and the last to rename its file wins.

    Args:
        path: an uncompressed tar.
        cache_dir: folder for index files; None keeps nothing.

    Raises:
        InvalidDataError: there is no such file, it is compressed, or it is no tar at all.
    """
    try:
        status = path.stat()
    except OSError as error:
        raise InvalidDataError(f"cannot read shard {path}: {error.strerror}; check the path in `shards`") from error
    if cache_dir is None:
        index = _scan(path, status.st_size)
    else:
        identity = f"{FORMAT_VERSION}\0{path.resolve()}\0{status.st_size}\0{status.st_mtime_ns}"
        file = cache_dir / f"{hashlib.sha256(identity.encode('utf-8', 'surrogateescape')).hexdigest()[:32]}.npz"
        cached = _read_cached(file, path)
        if cached is None:
            index = _scan(path, status.st_size)
            _write_cached(file, index)
        else:
            index = cached
    if index.damage:
        log.warning("shard %s is damaged (%s); using the %d samples before that", path, index.damage, len(index))
    return index


def _scan(path: Path, num_bytes: int) -> ShardIndex:
    """Walk the headers of a tar of `num_bytes`, without reading its members' content."""
    _refuse_compressed(path)
    members: dict[str, dict[str, tuple[int, int]]] = {}
    damage = ""
    try:
        with tarfile.open(path, "r:") as tar:
            try:
                while (member := tar.next()) is not None:
                    kind, key = _classify(member.name)
                    if kind is not None and member.isreg() and member.offset_data + member.size <= num_bytes:
                        members.setdefault(key, {}).setdefault(kind, (member.offset_data, member.size))
            except tarfile.ReadError as error:
                damage = f"{error} near byte {tar.offset:,}"
            damage = damage or _missing_end(path, tar.offset)
    except tarfile.ReadError as error:
        if num_bytes >= tarfile.BLOCKSIZE:
            raise InvalidDataError(f"{path} is not a tar file ({error})") from error
        damage = f"only {num_bytes} bytes long"
    with_image = {key: kinds for key, kinds in members.items() if "image" in kinds}
    return ShardIndex(
        path=path,
        keys=StringTable.from_strings(with_image),
        images=_spans(with_image, "image"),
        captions=_spans(with_image, "caption"),
        labels=_spans(with_image, "label"),
        damage=damage,
    )


def _classify(name: str) -> tuple[str | None, str]:
    """(kind, key) of a member name; kind is None for what is passed over."""
    folder, slash, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    extension = extension.lower()
    kind = "image" if extension in IMAGE_EXTENSIONS else {"txt": "caption", "cls": "label"}.get(extension)
    return kind, folder + slash + stem


def _spans(members: dict[str, dict[str, tuple[int, int]]], kind: str) -> Spans:
    rows = [kinds.get(kind, (ABSENT, 0)) for kinds in members.values()]
    table = np.array(rows, dtype=np.int64).reshape(-1, 2)
    return Spans(np.ascontiguousarray(table[:, 0]), np.ascontiguousarray(table[:, 1]))


def _refuse_compressed(path: Path) -> None:
    with path.open("rb") as file:
        start = file.read(6)
    for magic, name in COMPRESSION_MAGIC.items():
        if start.startswith(magic):
            raise InvalidDataError(f"{path} is compressed with {name}, which allows no random access; decompress it to a plain .tar")


def _missing_end(path: Path, offset: int) -> str:
    """What is wrong where the tar's headers end: a whole tar ends in a block of zeros. `tarfile` itself stops there silently."""
    with path.open("rb") as file:
        file.seek(offset)
        block = file.read(tarfile.BLOCKSIZE)
    if block == bytes(tarfile.BLOCKSIZE):
        return ""
    return f"{'no valid header' if len(block) == tarfile.BLOCKSIZE else 'cut short'} at byte {offset:,}"


def _read_cached(file: Path, path: Path) -> ShardIndex | None:
    """The cached index, or None where there is none or it cannot be read (it is then built again)."""
    if not file.exists():
        return None
    try:
        with np.load(io.BytesIO(file.read_bytes()), allow_pickle=False) as stored:
            return ShardIndex(
                path=path,
                keys=StringTable(stored["key_blob"], stored["key_offsets"]),
                images=Spans(stored["image_offsets"], stored["image_sizes"]),
                captions=Spans(stored["caption_offsets"], stored["caption_sizes"]),
                labels=Spans(stored["label_offsets"], stored["label_sizes"]),
                damage=str(stored["damage"]),
            )
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        log.warning("building the index of %s again, since its cached one %s is unreadable: %s", path, file, error)
        return None


def _write_cached(file: Path, index: ShardIndex) -> None:
    buffer = io.BytesIO()
    np.savez(
        buffer,
        key_blob=index.keys.blob,
        key_offsets=index.keys.offsets,
        image_offsets=index.images.offsets,
        image_sizes=index.images.sizes,
        caption_offsets=index.captions.offsets,
        caption_sizes=index.captions.sizes,
        label_offsets=index.labels.offsets,
        label_sizes=index.labels.sizes,
        damage=np.array(index.damage),
    )
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(file, buffer.getvalue())


class Descriptor:
    """A file open for `os.pread`, closed when its last user lets go, so that a cache may drop it while a thread still reads."""

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

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
