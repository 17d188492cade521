"""Which teacher stores there are, and how they go: list, delete, evict. It imports pydantic only, as `store_dir` does."""

from __future__ import annotations

import logging
import os
import shutil
import time
import uuid
from contextlib import suppress
from pathlib import Path

from cliprd_core.store_dir import (
    CREATING_PREFIX,
    DELETED_PREFIX,
    DIGEST,
    FILES,
    LOCK_FILE,
    META_FILE,
    USAGE_FILE,
    StoreInUseError,
    StoreMeta,
    StoreNotFoundError,
    StoreRecord,
    StoreUsage,
    lock_exclusively,
    read_or_none,
)

logger = logging.getLogger(__name__)

ABANDONED_SECONDS = 3600.0
"""A store that was being made for this long never will be: its maker is gone."""


def list_stores(root: Path) -> list[StoreRecord]:
    """All stores, most recently used first. Reads a few small files of each, never the features."""
    folders = [folder for folder in root.iterdir() if DIGEST.fullmatch(folder.name)] if root.is_dir() else []
    records = [_describe(folder) for folder in folders]
    return sorted((record for record in records if record is not None), key=lambda record: record.usage.last_used, reverse=True)


def _describe(folder: Path) -> StoreRecord | None:
    stats = []
    for name in FILES:
        with suppress(FileNotFoundError):
            stats.append((folder / name).stat())
    record = StoreRecord(
        key=folder.name,
        meta=read_or_none(folder / META_FILE, StoreMeta),
        usage=read_or_none(folder / USAGE_FILE, StoreUsage) or StoreUsage(),
        num_bytes=sum(stat.st_size for stat in stats),
        num_bytes_on_disk=sum(stat.st_blocks * 512 for stat in stats),  # POSIX counts blocks of 512 bytes, whatever the disk's are
        in_use=_is_in_use(folder),
    )
    return record if folder.is_dir() else None  # None: removed meanwhile


def _is_in_use(folder: Path) -> bool:
    try:
        descriptor = lock_exclusively(folder)
    except StoreInUseError:
        return True
    if descriptor is not None:
        os.close(descriptor)
    return False


def delete_store(root: Path, digest: str) -> None:
    """Remove a store and free its space.

    Raises:
        StoreNotFoundError: there is none of that key.
        StoreInUseError: a run uses it.
        OSError: its folder can't be changed.
    """
    folder = root / digest
    if not DIGEST.fullmatch(digest) or not folder.is_dir():
        raise StoreNotFoundError(digest)
    trash = root / f"{DELETED_PREFIX}{uuid.uuid4().hex}"
    descriptor = lock_exclusively(folder)
    try:
        if descriptor is None and (folder / LOCK_FILE).exists():
            raise StoreInUseError(digest)  # removed and made anew by others this very moment
        folder.rename(trash)
    except FileNotFoundError as error:
        raise StoreNotFoundError(digest) from error
    finally:
        if descriptor is not None:  # else a damaged store that has lost its lock, which nothing can use
            os.close(descriptor)
    shutil.rmtree(trash, ignore_errors=True)  # what stays of it is swept up by the next eviction


def evict(root: Path, max_bytes: int) -> list[StoreRecord]:
    """Delete stores, least recently used first, until all together take at most `max_bytes` on disk; and what crashes left behind.

    Stores in use stay, so the limit is one for what lies idle. A run that is about to open a store that goes makes it anew: it costs the
    teacher's passes, and nothing else.

    Returns:
        What was deleted.

    Raises:
        OSError: a folder can't be read or changed.
    """
    _sweep(root)
    records = list_stores(root)
    total = sum(record.num_bytes_on_disk for record in records)
    evicted = []
    for record in reversed(records):
        if total <= max_bytes:
            break
        with suppress(StoreInUseError, StoreNotFoundError):
            delete_store(root, record.key)
            evicted.append(record)
            total -= record.num_bytes_on_disk
    if total > max_bytes:
        logger.warning("teacher stores take %d bytes, more than the limit of %d; those that are left are in use", total, max_bytes)
    return evicted


def _sweep(root: Path) -> None:
    for folder in root.glob(".*-*"):
        with suppress(FileNotFoundError):
            is_abandoned = folder.name.startswith(CREATING_PREFIX) and time.time() - folder.stat().st_mtime > ABANDONED_SECONDS
            if is_abandoned or folder.name.startswith(DELETED_PREFIX):
                shutil.rmtree(folder, ignore_errors=True)
