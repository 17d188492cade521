"""Random access into tar shards: where each sample's members lie, found once per tar and kept in a cache folder.

Members are named as `webdataset` names them: the key is the path up to the first dot of the file name, the rest is the extension.
`KEY.png|jpg|jpeg|webp` is the image, `KEY.txt` the caption, `KEY.cls` the class; everything else is passed over.
"""

from __future__ import annotations

import hashlib
import io
import logging
import tarfile
import zipfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cliprd_core.data.errors import InvalidDataError
from cliprd_core.data.fingerprint import NUM_SAMPLED, Fingerprint, spread
from cliprd_core.data.shard_files import Descriptor, LocalShard, Shard
from cliprd_core.data.string_table import StringTable
from cliprd_core.run_dir import write_atomically

log = logging.getLogger(__name__)

FORMAT_VERSION = 2
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

    shard: Shard
    keys: StringTable
    images: Spans
    captions: Spans
    labels: Spans
    damage: str  # empty, or what is wrong with the tar; the samples before the damage are listed
    fingerprint: str  # of the tar's content, as `fingerprint` describes it

    def __len__(self) -> int:
        return len(self.keys)


def load_shard_index(path: Path, cache_dir: Path | None = None) -> ShardIndex:
    """`load_index` of a local file.

    Raises:
        InvalidDataError: there is no such file, it is compressed, or it is no tar at all.
    """
    return load_index(LocalShard.find(path), cache_dir)


def load_index(shard: Shard, cache_dir: Path | None) -> ShardIndex:
    """The index of one tar: from the cache, else by walking the tar's headers (and then cached).

    Safe for several processes and jobs at once: each may build the same index, and the last to rename its file wins.

    Args:
        shard: an uncompressed tar. A remote one is fetched only where its index is not in the cache.
        cache_dir: folder for index files; None keeps nothing.

    Raises:
        InvalidDataError: it is compressed, or it is no tar at all.
        OSError: it cannot be opened, or fetched.
    """
    if cache_dir is None:
        index = _scan(shard)
    else:
        identity = f"{FORMAT_VERSION}\0{shard.identity}"
        file = cache_dir / f"{hashlib.sha256(identity.encode('utf-8', 'surrogateescape')).hexdigest()[:32]}.npz"
        cached = _read_cached(file, shard)
        if cached is None:
            index = _scan(shard)
            _write_cached(file, index)
        else:
            index = cached
    if index.damage:
        log.warning("shard %s is damaged (%s); using the %d samples before that", shard, index.damage, len(index))
    return index


def _scan(shard: Shard) -> ShardIndex:
    """Walk the headers of a tar, without reading its members' content beyond the fingerprint's sample."""
    opened = shard.open()  # holds a fetched copy on the disk
    path, num_bytes = opened.path, shard.num_bytes
    _refuse_compressed(shard, opened)
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
            raise InvalidDataError(f"{shard} is not a tar file ({error})") from error
        damage = f"only {num_bytes} bytes long"
    with_image = {key: kinds for key, kinds in members.items() if "image" in kinds}
    keys = StringTable.from_strings(with_image)
    images, captions, labels = (_spans(with_image, kind) for kind in ("image", "caption", "label"))
    return ShardIndex(
        shard=shard,
        keys=keys,
        images=images,
        captions=captions,
        labels=labels,
        damage=damage,
        fingerprint=_fingerprint(opened, num_bytes, keys, (images, captions, labels)),
    )


def _fingerprint(opened: Descriptor, num_bytes: int, keys: StringTable, kinds: tuple[Spans, Spans, Spans]) -> str:
    fingerprint = Fingerprint("shard")
    fingerprint.add_number(num_bytes)
    for table in (keys.blob, keys.offsets):
        fingerprint.add_array(table)
    for spans in kinds:
        fingerprint.add_array(spans.offsets)
        fingerprint.add_array(spans.sizes)
    for row in spread(len(keys), NUM_SAMPLED):
        for spans in kinds:
            offset, size = int(spans.offsets[row]), int(spans.sizes[row])
            if offset != ABSENT:
                fingerprint.add_ends(size, partial(_read_inside, opened, offset))
    return fingerprint.hexdigest()


def _read_inside(opened: Descriptor, start: int, offset: int, size: int) -> bytes:
    return opened.read(start + offset, size)


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


def _refuse_compressed(shard: Shard, opened: Descriptor) -> None:
    start = opened.read(0, min(6, shard.num_bytes))
    for magic, name in COMPRESSION_MAGIC.items():
        if start.startswith(magic):
            raise InvalidDataError(f"{shard} is compressed with {name}, which allows no random access; decompress it to a plain .tar")


def _missing_end(path: Path, offset: int) -> str:
    """What is wrong where the tar's headers end: a whole tar ends in a block of zeros. `tarfile` itself stops there silently."""
    with path.open("rb") as file:
        file.seek(offset)
        block = file.read(tarfile.BLOCKSIZE)
    if block == bytes(tarfile.BLOCKSIZE):
        return ""
    return f"{'no valid header' if len(block) == tarfile.BLOCKSIZE else 'cut short'} at byte {offset:,}"


def _read_cached(file: Path, shard: Shard) -> ShardIndex | None:
    """The cached index, or None where there is none or it cannot be read (it is then built again)."""
    if not file.exists():
        return None
    try:
        with np.load(io.BytesIO(file.read_bytes()), allow_pickle=False) as stored:
            index = ShardIndex(
                shard=shard,
                keys=StringTable(stored["key_blob"], stored["key_offsets"]),
                images=Spans(stored["image_offsets"], stored["image_sizes"]),
                captions=Spans(stored["caption_offsets"], stored["caption_sizes"]),
                labels=Spans(stored["label_offsets"], stored["label_sizes"]),
                damage=str(stored["damage"]),
                fingerprint=str(stored["fingerprint"]),
            )
        if any(len(spans.offsets) != len(index) for spans in (index.images, index.captions, index.labels)):
            raise ValueError("its parts are of different lengths")  # noqa: TRY301  handled as any other damage
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        log.warning("building the index of %s again, since its cached one %s is unreadable: %s", shard, file, error)
        return None
    return index


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
        fingerprint=np.array(index.fingerprint),
    )
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, buffer.getvalue())
    except OSError as error:
        log.warning("cannot keep the index of %s, so the next run builds it again: %s", index.shard, error)
