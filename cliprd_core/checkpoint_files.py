"""Whether checkpoints are what their markers say. Without torch: the worker asks too, before it restores or mirrors any."""

from __future__ import annotations

import logging
from collections.abc import Set
from pathlib import Path

from cliprd_core.hashes import file_sha256
from cliprd_core.run_dir import CHECKPOINT_MARKER, CheckpointFile, CheckpointMarker, complete_checkpoints, read_record

logger = logging.getLogger(__name__)


def latest_whole(run: Path, required: Set[str] = frozenset()) -> Path | None:
    """Folder of the newest checkpoint whose files all match its marker, `required` among them. Damaged newer ones are disowned."""
    for folder in reversed(complete_checkpoints(run)):
        fault = find_fault(folder, required)
        if fault is None:
            return folder
        disown(folder, fault)
    return None


def disown(folder: Path, fault: str) -> None:
    """Remove a damaged checkpoint's marker, with a warning: it no longer counts as the newest, as one to keep or as one to mirror."""
    logger.warning("checkpoint %s is damaged (%s); falling back to the one before", folder.name, fault)
    (folder / CHECKPOINT_MARKER).unlink(missing_ok=True)


def find_fault(folder: Path, required: Set[str] = frozenset()) -> str | None:
    """What is wrong with a checkpoint that claims to be complete, or None. All its files are read."""
    try:
        marker = read_record(folder / CHECKPOINT_MARKER, CheckpointMarker)
    except ValueError:
        return f"{CHECKPOINT_MARKER} is not readable"
    if marker is None:
        return f"{CHECKPOINT_MARKER} is missing"
    missing = required - {file.name for file in marker.files}
    if missing:
        return f"{CHECKPOINT_MARKER} does not list {sorted(missing)}"
    return next((fault for file in marker.files if (fault := _find_fault_of(folder / file.name, file)) is not None), None)


def _find_fault_of(path: Path, file: CheckpointFile) -> str | None:
    if not path.is_file():
        return f"{file.name} is missing"
    if path.stat().st_size != file.num_bytes:
        return f"{file.name} has {path.stat().st_size} bytes instead of {file.num_bytes}"
    return None if file_sha256(path) == file.sha256 else f"{file.name} does not match its hash"
