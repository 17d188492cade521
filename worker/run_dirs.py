"""The run directories of this worker's machine: who uses one, and which can go."""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from service.logs import about

logger = logging.getLogger(__name__)

LOCK_FILE = "in-use.lock"
BATCH_SIZE = 500


@contextmanager
def in_use(run: Path) -> Iterator[None]:
    """Make the run directory where there is none, and keep it from removal; the kernel lets go of it when the process ends.

    Shared, since an attempt that lost its lease may still be stopping when the next one starts on the same machine.
    """
    run.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(run / LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        with suppress(OSError):  # a file system without locks: then it counts as in use for good
            fcntl.flock(descriptor, fcntl.LOCK_SH)
        yield
    finally:
        os.close(descriptor)


def run_dirs_of(runs_root: Path, deleted_among: Callable[[Sequence[str]], set[str]]) -> list[str]:
    """Names of the run directories of deleted jobs.

    Args:
        runs_root: Folder of the run directories, each named by its job's id. What else may lie there is not among them.
        deleted_among: Those of some names that are ids of jobs known to be deleted. That a job is unknown says nothing: the database
            may have been restored from an older copy, or be another one.
    """
    try:
        names = sorted(entry.name for entry in os.scandir(runs_root) if entry.is_dir(follow_symlinks=False))
    except FileNotFoundError:
        return []
    starts = range(0, len(names), BATCH_SIZE)
    return [name for start in starts for name in sorted(deleted_among(names[start : start + BATCH_SIZE]))]


def remove_run_dirs(runs_root: Path, names: Sequence[str], *, max_seconds: float) -> bool:
    """Remove these run directories, other than those in use.

    Args:
        runs_root: Folder of the run directories.
        names: Those to remove.
        max_seconds: No further one is begun after this time.

    Returns:
        Whether that was all.
    """
    until = time.monotonic() + max_seconds
    for name in names:
        if time.monotonic() > until:
            return False
        _remove(runs_root / name)
    return True


def _remove(run: Path) -> None:
    if _is_in_use(run):
        return
    try:
        shutil.rmtree(run)  # what is interrupted here goes on in the next round, as the job is still known to be deleted
    except FileNotFoundError:
        pass  # another worker of the same folder removes it, too
    except OSError:
        logger.exception("the run directory of deleted job %s could not be removed", run.name, extra=about(run.name))
    else:
        logger.info("removed the run directory of deleted job %s", run.name, extra=about(run.name))


def _is_in_use(run: Path) -> bool:
    try:
        descriptor = os.open(run / LOCK_FILE, os.O_RDWR)
    except FileNotFoundError:
        return False  # every attempt makes the file before anything else
    except OSError:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(descriptor)
    return False
