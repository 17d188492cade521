"""The run directories of this worker's machine: who uses one, and which can go."""

from __future__ import annotations

import fcntl
import logging
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from cliprd_core.run_dir import complete_checkpoints, step_of
from service.logs import about
from service.store.unneeded_runs import LocalRun

logger = logging.getLogger(__name__)

LOCK_FILE = "in-use.lock"
"""Locked by who uses a run directory; it holds the number of the last attempt that did."""
REMOVING_PREFIX = ".removing-"
BATCH_SIZE = 500


@contextmanager
def in_use(run: Path, attempt: int) -> Iterator[None]:
    """Make the run directory where there is none, and keep it from removal; the kernel lets go of it when the process ends.

    Shared, since an attempt that lost its lease may still be stopping when the next one starts on the same machine.
    """
    descriptor = _lock_shared(run)
    try:
        if attempt > (_read_attempt(descriptor) or 0):
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"{attempt}\n".encode(), 0)
        yield
    finally:
        os.close(descriptor)


def _lock_shared(run: Path) -> int:
    """The open lock file of a directory that nobody has set aside meanwhile."""
    while True:
        run.mkdir(parents=True, exist_ok=True)
        try:
            descriptor = os.open(run / LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o600)
        except FileNotFoundError:
            continue
        with suppress(OSError):  # a file system without locks: then it counts as in use for good
            fcntl.flock(descriptor, fcntl.LOCK_SH)
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), (run / LOCK_FILE).stat()):
                return descriptor
        os.close(descriptor)


def _read_attempt(descriptor: int) -> int | None:
    try:
        return int(os.pread(descriptor, 32, 0))
    except ValueError:
        return None


def run_dirs_of(runs_root: Path, unneeded_among: Callable[[Mapping[str, LocalRun]], set[str]]) -> list[str]:
    """Names of the run directories that can go, and of those whose removal was interrupted.

    Args:
        runs_root: Folder of the run directories, each named by its job's id. What else may lie there is not among them.
        unneeded_among: Those of some that are known to be needed no more. That a job is unknown says nothing: the database may have been
            restored from an older copy, or be another one.
    """
    try:
        names = sorted(entry.name for entry in os.scandir(runs_root) if entry.is_dir(follow_symlinks=False))
    except FileNotFoundError:
        return []
    found = [name for name in names if name.startswith(REMOVING_PREFIX)]
    for start in range(0, len(names), BATCH_SIZE):
        found += sorted(unneeded_among({name: _look_at(runs_root / name) for name in names[start : start + BATCH_SIZE]}))
    return found


def _look_at(run: Path) -> LocalRun:
    saved = complete_checkpoints(run)
    attempt = None
    with suppress(OSError, ValueError):
        attempt = int((run / LOCK_FILE).read_text())
    return LocalRun(attempt=attempt, step=step_of(saved[-1]) if saved else 0)


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
    job_id = run.name
    try:
        aside = run if run.name.startswith(REMOVING_PREFIX) else _set_aside(run)
        if aside is None:
            return
        shutil.rmtree(aside)  # what is interrupted here goes on in the next round
    except FileNotFoundError:
        pass  # another worker of the same folder removes it, too
    except OSError:
        logger.exception("run directory %s, which nothing needs, could not be removed", run.name, extra=about(job_id))
    else:
        logger.info("removed run directory %s, which nothing needed", run.name, extra=about(job_id))


def _set_aside(run: Path) -> Path | None:
    """Give it a name under which no attempt looks for it, as a job may be retried at this moment. None: it is in use."""
    descriptor = None
    try:
        with suppress(FileNotFoundError):  # every attempt makes the file before anything else
            descriptor = os.open(run / LOCK_FILE, os.O_RDWR)
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return None
    else:
        return run.rename(run.with_name(f"{REMOVING_PREFIX}{run.name}-{secrets.token_hex(4)}"))
    finally:
        if descriptor is not None:
            os.close(descriptor)
