"""Image-text pairs by number, from tar shards and from tables, joined into one sequence."""

from __future__ import annotations

import csv
import functools
import glob
import logging
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby
from pathlib import Path
from typing import Protocol

import numpy as np
from braceexpand import braceexpand

from cliprd_core.data.errors import CorruptSampleError, InvalidDataError
from cliprd_core.data.fingerprint import NUM_SAMPLED_FILES, Fingerprint, joined_fingerprint, spread
from cliprd_core.data.remote import RemoteShards, expand_s3_glob, is_remote
from cliprd_core.data.shard_files import without_secrets
from cliprd_core.data.shard_index import ShardIndex, load_shard_index
from cliprd_core.data.shard_reader import ShardReader
from cliprd_core.data.string_table import StringTable
from cliprd_core.locations import ForbiddenLocationError, Locations
from cliprd_core.run_dir import SHARD_CACHE_BYTES_VARIABLE, shard_cache_bytes
from cliprd_core.spec import CsvSource, DataSource, WebDatasetSource

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RawSample:
    """One pair as it is stored."""

    key: str  # which pair, for people: `SHARD:KEY` or the image's path
    image_bytes: bytes  # an encoded image
    caption: str  # stripped, never empty


class PairSource(Protocol):
    """A fixed sequence of pairs with random access."""

    def __len__(self) -> int: ...

    @property
    def fingerprint(self) -> str:
        """What the data is, wherever it lies: 64 hexadecimal digits. See `cliprd_core.data.fingerprint` for what it can miss."""
        ...

    def read(self, index: int) -> RawSample:
        """Pair `index`, 0 <= index < len(self).

        Raises:
            CorruptSampleError: it cannot be read, or has no caption.
        """
        ...


class WebDatasetPairs:
    """The pairs of tar shards: every sample that has an image and a caption."""

    def __init__(self, shards: Sequence[ShardIndex], num_samples: int | None = None) -> None:
        self._reader = ShardReader(shards)
        has_caption = np.concatenate([shard.captions.present for shard in shards]) if shards else np.zeros(0, dtype=np.bool_)
        self._rows = np.flatnonzero(has_caption)[:num_samples]
        self._shard_fingerprints = [shard.fingerprint for shard in shards]

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def fingerprint(self) -> str:
        return joined_fingerprint("webdataset", [str(len(self)), *self._shard_fingerprints])

    def read(self, index: int) -> RawSample:
        row = int(self._rows[index])
        key = self._reader.key(row)
        image_bytes, caption = self._reader.read(row, "images", "captions")
        return RawSample(key, image_bytes, clean_caption(key, caption))


class CsvPairs:
    """The pairs of a table; images are files of their own."""

    def __init__(self, image_paths: StringTable, captions: StringTable, image_root: Path, allowed: Locations) -> None:
        assert len(image_paths) == len(captions)
        self._allowed = allowed
        self._image_paths = image_paths
        self._captions = captions
        self._image_root = image_root

    def __len__(self) -> int:
        return len(self._image_paths)

    @functools.cached_property
    def fingerprint(self) -> str:
        """Paths count as the table has them, less `image_root`."""
        fingerprint = Fingerprint("csv")
        for table in (self._image_paths, self._captions):
            fingerprint.add_array(table.blob)
            fingerprint.add_array(table.offsets)
        for index in spread(len(self), NUM_SAMPLED_FILES):
            try:
                content = self._read_image(self._path(index))
            except (OSError, ValueError):  # it is corrupt for training, too
                fingerprint.add(b"unreadable")
            else:
                fingerprint.add_content(content)
        return fingerprint.hexdigest()

    def _path(self, index: int) -> Path:
        return self._image_root / self._image_paths[index]  # an absolute path stays as it is

    def _read_image(self, path: Path) -> bytes:
        self._allowed.check_path(path)
        return path.read_bytes()

    def read(self, index: int) -> RawSample:
        path = self._path(index)
        try:
            image_bytes = self._read_image(path)
        except (OSError, ValueError) as error:  # ValueError: a NUL byte in the path, or a path that is not allowed
            raise CorruptSampleError(str(path), f"cannot read its image: {error}") from error
        return RawSample(str(path), image_bytes, clean_caption(str(path), self._captions[index].encode()))


class JoinedPairs:
    """Several sources one after another."""

    def __init__(self, sources: Sequence[PairSource]) -> None:
        self._sources = list(sources)
        self._ends = list(accumulate(len(source) for source in sources))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    @property
    def fingerprint(self) -> str:
        return joined_fingerprint("joined", [source.fingerprint for source in self._sources])

    def read(self, index: int) -> RawSample:
        number = bisect_right(self._ends, index)
        return self._sources[number].read(index - (self._ends[number - 1] if number else 0))


def open_sources(sources: Sequence[DataSource], cache_dir: Path) -> PairSource:
    """Open every source and join them in order.

    Args:
        sources: `data.train` or `data.validation` of the spec.
        cache_dir: folder for the shards' index files and for copies of remote shards; any number of processes and jobs may share it.

    Raises:
        InvalidDataError: files or columns are missing, or a source holds no pair.
    """
    opened = [_open_shards(source, cache_dir) if isinstance(source, WebDatasetSource) else _open_table(source) for source in sources]
    return opened[0] if len(opened) == 1 else JoinedPairs(opened)


def clean_caption(key: str, content: bytes) -> str:
    """The caption in a file's content.

    Raises:
        CorruptSampleError: it is not UTF-8, or blank.
    """
    try:
        caption = content.decode("utf-8").strip()
    except UnicodeDecodeError as error:
        raise CorruptSampleError(key, f"its caption is not UTF-8: {error}") from error
    if not caption:
        raise CorruptSampleError(key, "its caption is empty")
    return caption


def expand_shards(pattern: str) -> Iterator[str]:
    """The paths and URLs that brace ranges and globs name, in order (a glob's matches sorted). `http` has no globs.

    Raises:
        InvalidDataError: unbalanced braces, nothing matches, or a job may not read from there.
    """
    try:
        names = list(braceexpand(pattern))
    except ValueError as error:
        raise InvalidDataError(f"`shards` has unbalanced braces: {pattern!r}; write a range as {{00000..00007}}") from error
    allowed = Locations.from_environment()
    try:
        for name in names:
            yield from _expand_glob(name, allowed)
    except ForbiddenLocationError as error:
        raise InvalidDataError(f"`shards`: {error}") from error


def _expand_glob(name: str, allowed: Locations) -> Iterator[str]:
    """The files or objects of one name without braces, as far as they are allowed. No server is asked that is not."""
    if is_remote(name):
        allowed.check_url(name)
    is_plain = not glob.has_magic(name) or name.startswith("http") or (not is_remote(name) and Path(name).exists())
    if is_plain:
        matches = [name]
    elif is_remote(name):
        matches = expand_s3_glob(name)
    else:
        matches = sorted(glob.glob(name, recursive=True))  # noqa: PTH207  Path.glob takes no absolute pattern
    if not matches:
        raise InvalidDataError(f"no file matches {name!r}; check the path in `shards`")
    for match in matches:
        if not is_remote(match):
            allowed.check_path(match)
        yield match


def _open_shards(source: WebDatasetSource, cache_dir: Path) -> WebDatasetPairs:
    shards: list[ShardIndex] = []
    num_pairs = num_without_caption = 0
    for shard in _indexes(source.shards, cache_dir):
        shards.append(shard)
        num_shard_pairs = int(shard.captions.present.sum())
        num_pairs += num_shard_pairs
        num_without_caption += len(shard) - num_shard_pairs
        if source.num_samples is not None and num_pairs >= source.num_samples:
            break
    if num_without_caption:
        log.warning("%d images in %s have no caption (KEY.txt) and are left out", num_without_caption, source.shards)
    if not num_pairs:
        raise InvalidDataError(
            f"there is no image-text pair in {source.shards!r}; a shard must hold KEY.png|jpg|jpeg|webp and KEY.txt for each pair"
        )
    num_remote_bytes = sum(shard.shard.num_bytes for shard in shards if not shard.shard.stays_open)
    if num_remote_bytes > shard_cache_bytes():
        log.warning(
            "the shards of %s have %.1f GB and the cache for them %.1f GB: they will be fetched over and over, since pairs are read in"
            " random order; raise %s",
            without_secrets(source.shards),
            num_remote_bytes / 1e9,
            shard_cache_bytes() / 1e9,
            SHARD_CACHE_BYTES_VARIABLE,
        )
    return WebDatasetPairs(shards, source.num_samples)


def _indexes(pattern: str, cache_dir: Path) -> Iterator[ShardIndex]:
    for are_remote, names in groupby(expand_shards(pattern), key=is_remote):
        if are_remote:
            yield from RemoteShards(cache_dir, shard_cache_bytes()).indexes(names)
        else:
            for name in names:
                yield load_shard_index(Path(name), cache_dir)


def _open_table(source: CsvSource) -> CsvPairs:
    path = Path(source.path)
    image_root = path.parent if source.image_root is None else Path(source.image_root)
    root_prefix = f"{image_root}/"  # taken off, so that the fingerprint doesn't tell where the data lies
    image_paths: list[str] = []
    captions: list[str] = []
    allowed = Locations.from_environment()
    try:
        allowed.check_path(path)
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = csv.reader(file, delimiter=source.separator)
            header = next(rows, [])
            image_column, caption_column = (_column(header, name, source) for name in (source.image_column, source.caption_column))
            for row in rows:
                if source.num_samples is not None and len(image_paths) >= source.num_samples:
                    break
                if row:  # a blank line is no row
                    image_path = row[image_column] if image_column < len(row) else ""
                    if image_path.startswith(root_prefix):
                        image_path = image_path.removeprefix(root_prefix).lstrip("/")
                    image_paths.append(image_path)
                    captions.append(row[caption_column] if caption_column < len(row) else "")
    except OSError as error:
        raise InvalidDataError(f"cannot read table {path}: {error.strerror}; check `path`") from error
    except ForbiddenLocationError as error:
        raise InvalidDataError(f"`path`: {error}") from error
    except UnicodeDecodeError as error:
        raise InvalidDataError(f"table {path} is not UTF-8: {error}") from error
    except csv.Error as error:
        raise InvalidDataError(f"table {path} is malformed near line {rows.line_num}: {error}") from error
    if not image_paths:
        raise InvalidDataError(f"table {path} has a header but no rows")
    return CsvPairs(StringTable.from_strings(image_paths), StringTable.from_strings(captions), image_root, allowed)


def _column(header: list[str], name: str, source: CsvSource) -> int:
    if name in header:
        return header.index(name)
    raise InvalidDataError(
        f"table {source.path} has no column {name!r}; with separator {source.separator!r} its columns are {header}."
        " Set `image_column`, `caption_column` or `separator`"
    )
