"""The files of the teacher store: their names, the records in them, and how stores are made, locked and counted.

Like `run_dir`, this is a contract: the trainer fills and reads stores (`teacher_store`); the worker evicts, and the API lists and
deletes them (`store_removal`). It imports pydantic only. One root folder holds one folder per store, named by the digest of its key:

    meta.json             StoreMeta: everything the features depend on, readable
    images.bin            (num_views, num_samples, width) features, two bytes a number; sparse, so an absent row takes no space
    image_checksums.bin   (num_views, num_samples) uint32: CRC-32 of each row's bytes, a CRC of 0 kept as 1; 0: the row is absent
    texts.bin             (num_samples, width) features
    text_checksums.bin    (num_samples) uint32
    usage.json            StoreUsage; usage.lock serialises who adds to it
    lock                  held shared (flock) by whoever uses the store, exclusively by whoever removes it

A folder gets its name when it is whole and loses it before the first file goes, so a crash never leaves half a store that looks
whole; what a crash does leave has a hidden name and is swept up by the next eviction. Locks are the kernel's and end with their process.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import time
import uuid
from pathlib import Path
from typing import Literal

from pydantic import Field, JsonValue

from cliprd_core.run_dir import AnyRecord, Record, read_record, write_atomically

FORMAT_VERSION = 1
"""Part of every key: a version that stores features in another way never meets this one's files."""

META_FILE = "meta.json"
IMAGES_FILE = "images.bin"
IMAGE_CHECKSUMS_FILE = "image_checksums.bin"
TEXTS_FILE = "texts.bin"
TEXT_CHECKSUMS_FILE = "text_checksums.bin"
USAGE_FILE = "usage.json"
USAGE_LOCK_FILE = "usage.lock"
LOCK_FILE = "lock"
FILES = (META_FILE, IMAGES_FILE, IMAGE_CHECKSUMS_FILE, TEXTS_FILE, TEXT_CHECKSUMS_FILE, USAGE_FILE, USAGE_LOCK_FILE, LOCK_FILE)

BYTES_PER_NUMBER = 2
BYTES_PER_CHECKSUM = 4
NUM_LOCK_TRIES = 5
LOCK_PAUSE_SECONDS = 0.002

CREATING_PREFIX, DELETED_PREFIX = ".creating-", ".deleted-"
DIGEST = re.compile(r"[0-9a-f]{32}")


class StoreNotFoundError(LookupError):
    """There is no such teacher store."""

    def __init__(self, digest: str) -> None:
        super().__init__(f"there is no teacher store {digest!r}")


class StoreInUseError(RuntimeError):
    """The teacher store can't be removed, because a run uses it."""

    def __init__(self, digest: str) -> None:
        super().__init__(f"teacher store {digest!r} is in use; wait for the runs that use it to end, or cancel them, and try again")


class StoreKey(Record):
    """Everything that a stored feature depends on. Two runs share a store exactly where all of it is equal."""

    teacher_sha256: str = Field(description="Of the teacher's weights.")
    teacher_config: dict[str, JsonValue] = Field(description="The teacher's architecture, as in open_clip's config.")
    data_fingerprint: str = Field(description="Identifies the training pairs and their order, which numbers the rows.")
    num_samples: int = Field(ge=1, description="Training pairs, readable or not.")
    transform: dict[str, JsonValue] = Field(description="How images and captions become the teacher's input: size, colours, tokenizer, …")
    crop_scale: tuple[float, float] = Field(description="Area of the random crops, as a fraction of the image.")
    num_views: int = Field(ge=1, description="Different crops of each image.")
    seed: int = Field(description="Fixes the crops.")
    precision: str = Field(description="In which the teacher computes: `fp32`, `bf16`, …")
    width: int = Field(ge=1, description="Numbers in one feature, D.")
    dtype: Literal["float16", "bfloat16"] = Field(default="float16", description="Of the stored numbers.")

    @property
    def parts(self) -> dict[str, JsonValue]:
        """All fields and the format's version, as JSON: what `digest` hashes and meta.json shows."""
        return {"format": FORMAT_VERSION, **self.model_dump(mode="json")}

    @property
    def digest(self) -> str:
        """The store's folder: the first 32 hexadecimal digits of the SHA-256 of `parts` as canonical JSON."""
        canonical = json.dumps(self.parts, sort_keys=True, separators=(",", ":"), allow_nan=False)
        return hashlib.sha256(canonical.encode()).hexdigest()[:32]

    @property
    def file_sizes(self) -> dict[str, int]:
        """Apparent bytes of each data file."""
        num_images = self.num_views * self.num_samples
        return {
            IMAGES_FILE: num_images * self.width * BYTES_PER_NUMBER,
            IMAGE_CHECKSUMS_FILE: num_images * BYTES_PER_CHECKSUM,
            TEXTS_FILE: self.num_samples * self.width * BYTES_PER_NUMBER,
            TEXT_CHECKSUMS_FILE: self.num_samples * BYTES_PER_CHECKSUM,
        }


class StoreMeta(Record):
    """Content of meta.json."""

    format: int
    key: StoreKey
    teacher: str = Field(description="Name of the teacher, for people.")
    data: str = Field(description="The training data, for people.")
    created: float = Field(description="Unix seconds.")


class StoreUsage(Record):
    """Content of usage.json. Written now and then; a process that is killed takes its last counts with it."""

    hits: int = Field(default=0, description="Rows that were read and there.")
    misses: int = Field(default=0, description="Rows that were asked for and absent or damaged.")
    num_images: int = Field(default=0, description="Image rows that were filled when last counted.")
    num_texts: int = Field(default=0, description="Text rows that were filled when last counted.")
    last_used: float = Field(default=0.0, description="Unix seconds.")


class StoreRecord(Record):
    """One store, as listed."""

    key: str = Field(description="The digest that names it.")
    meta: StoreMeta | None = Field(description="None: its meta.json can't be read, and the store is good for deletion only.")
    usage: StoreUsage
    num_bytes: int = Field(description="Once it is full.")
    num_bytes_on_disk: int = Field(description="Now.")
    in_use: bool = Field(description="A run uses it now, so it can't be deleted.")


def create_store(root: Path, key: StoreKey, *, teacher: str, data: str) -> None:
    """Make an empty store, unless another process is first.

    Space for checksums is allocated at once, so that they can always be read through memory: a page that has no place on a full disk
    would otherwise kill the process that touches it. Features are sparse, and only rows whose checksum is there are ever read.

    Raises:
        OSError: the store can't be made; ENOSPC where the disk is full.
    """
    root.mkdir(parents=True, exist_ok=True)
    scratch = root / f"{CREATING_PREFIX}{uuid.uuid4().hex}"
    scratch.mkdir()
    try:
        for name, size in key.file_sizes.items():
            with (scratch / name).open("xb") as file:
                file.truncate(size)
                if name in (IMAGE_CHECKSUMS_FILE, TEXT_CHECKSUMS_FILE):
                    os.posix_fallocate(file.fileno(), 0, size)
        for name in (LOCK_FILE, USAGE_LOCK_FILE):
            (scratch / name).touch()
        meta = StoreMeta(format=FORMAT_VERSION, key=key, teacher=teacher, data=data, created=time.time())
        write_atomically(scratch / META_FILE, meta.model_dump_json(indent=2))
        write_atomically(scratch / USAGE_FILE, StoreUsage(last_used=meta.created).model_dump_json())
        scratch.rename(root / key.digest)
    except OSError as error:
        if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):  # those: another process was first
            raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def is_whole(folder: Path, key: StoreKey) -> bool:
    """Whether the store is this key's and its files have their sizes; their content is checked row by row as it is read."""
    meta = read_or_none(folder / META_FILE, StoreMeta)
    sizes = {name: (folder / name).stat().st_size for name in key.file_sizes if (folder / name).is_file()}
    return meta is not None and meta.key.parts == key.parts and sizes == key.file_sizes


def lock_shared(folder: Path) -> int | None:
    """Use a store: a file descriptor that protects it from removal until it is closed here and in all forked processes.

    Returns:
        None where there is no such store.
    """
    return _lock(folder, fcntl.LOCK_SH)


def _lock(folder: Path, operation: int) -> int | None:
    """Lock the store's `lock` file. Waiting never takes long: the exclusive lock is held for an instant only.

    Raises:
        BlockingIOError: LOCK_NB was asked for, and someone else holds it.
    """
    try:
        descriptor = os.open(folder / LOCK_FILE, os.O_RDWR)
    except (FileNotFoundError, NotADirectoryError):
        return None
    try:
        fcntl.flock(descriptor, operation)
        there = (folder / LOCK_FILE).stat()
        mine = os.fstat(descriptor)
        is_current = (there.st_dev, there.st_ino) == (mine.st_dev, mine.st_ino)
    except FileNotFoundError:
        is_current = False
    except BaseException:
        os.close(descriptor)
        raise
    if is_current:
        return descriptor
    os.close(descriptor)  # of a store that was removed while this process waited
    return None


def lock_exclusively(folder: Path) -> int | None:
    """Have a store to oneself, to remove it: a file descriptor to be closed at once, or None where there is no such store.

    Tried for some milliseconds, since others take the same lock for an instant to look.

    Raises:
        StoreInUseError: a run uses it.
    """
    for _ in range(NUM_LOCK_TRIES):
        try:
            return _lock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(LOCK_PAUSE_SECONDS)
    raise StoreInUseError(folder.name)


def add_usage(folder: Path, *, hits: int, misses: int, filled: tuple[int, int], wait: bool = False) -> bool:
    """Add to a store's counts and mark it as used now.

    Args:
        filled: Image and text rows that are there now.
        wait: For another process that is at it. Otherwise nothing is written then.

    Returns:
        Whether it was written.
    """
    with (folder / USAGE_LOCK_FILE).open("ab") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        before = read_or_none(folder / USAGE_FILE, StoreUsage) or StoreUsage()
        usage = StoreUsage(
            hits=before.hits + hits, misses=before.misses + misses, num_images=filled[0], num_texts=filled[1], last_used=time.time()
        )
        write_atomically(folder / USAGE_FILE, usage.model_dump_json())
        return True


def read_or_none(path: Path, kind: type[AnyRecord]) -> AnyRecord | None:
    """The record in a file; None where it is missing or damaged."""
    try:
        return read_record(path, kind)
    except ValueError:
        return None
