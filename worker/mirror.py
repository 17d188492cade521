"""Mirrors complete checkpoints to the artifact store, in a thread of its own: the newest, so that a job can resume on another machine,
and the one that an evaluation found best, to keep."""

from __future__ import annotations

import logging
import os
import secrets
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from cliprd_core.checkpoint_files import disown
from cliprd_core.retention import BestCheckpoint
from cliprd_core.run_dir import (
    BEST_FILE,
    CHECKPOINT_MARKER,
    CHECKPOINTS_DIR,
    MIRRORING_PREFIX,
    CheckpointFile,
    CheckpointMarker,
    checkpoint_dir,
    complete_checkpoints,
    read_record,
)
from service.store.blobs import StoredBlob
from service.store.jobs import LeaseLostError
from service.store.kinds import ArtifactKind
from worker.held_job import OUT_OF_REACH, HeldJob

logger = logging.getLogger(__name__)

RETRY_SECONDS = 10.0

PutFile = Callable[[Path], StoredBlob]


class DamagedCheckpointError(Exception):
    """A checkpoint is not what its marker says."""

    def __init__(self, folder: Path, fault: str) -> None:
        super().__init__(f"{folder.name}: {fault}")
        self.folder = folder
        self.fault = fault


class RemovedCheckpointError(Exception):
    """The trainer removed a checkpoint just now, for it has newer ones."""

    def __init__(self, folder: Path) -> None:
        super().__init__(f"{folder} was removed by the trainer")
        self.folder = folder


class CheckpointMirror:
    """Uploads the best and then the newest complete checkpoint whenever asked and idle; older ones that were never uploaded are skipped.
    One that is found damaged is disowned, and the one before takes its place; one that the trainer just removed gives way to the newest.

    An upload goes from links of its own to the files, as it may take longer than the trainer keeps the checkpoint.

    The best goes first: whoever resumes from the newest knows which one was the best before it, and must find that in the store.

    Args:
        job: Whose checkpoints.
        run: Its run directory.
        num_kept: Newest checkpoints to keep in the store.
    """

    def __init__(self, job: HeldJob, run: Path, num_kept: int) -> None:
        self._job = job
        self._run = run
        self._num_kept = num_kept
        self._mirrored: str | None = None  # name of the newest one in the store
        self._best_mirrored: str | None = None
        self._not_before = 0.0
        self._thread: threading.Thread | None = None

    def sweep(self) -> None:
        """Remove the links that a killed worker left; to be called before the first upload."""
        for folder in (self._run / CHECKPOINTS_DIR).glob(f"{MIRRORING_PREFIX}*"):
            shutil.rmtree(folder, ignore_errors=True)

    def start(self) -> None:
        """Mirror what is new, in the background. Returns at once, and does nothing while an upload runs."""
        is_busy = self._thread is not None and self._thread.is_alive()
        if is_busy or time.monotonic() < self._not_before or (self._newest() is None and self._best() is None):
            return
        self._thread = threading.Thread(target=self._try_mirror, name="mirror", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Wait for a running upload."""
        if self._thread is not None:
            self._thread.join()

    def mirror(self) -> None:
        """Mirror what is new, now.

        Raises:
            LeaseLostError: the job is another worker's now.
            OSError: a file could not be copied; others of OUT_OF_REACH: the database is.
        """
        self.wait()
        self._until_done(self._upload)

    def mirror_best(self) -> None:
        """Mirror the best one if that is new, now, however long the store is away.

        Raises:
            StopAskedError: the run is to stop meanwhile; others as of `mirror`.
        """
        self.wait()
        self._until_done(partial(self._upload_best, self._job.put_file_patiently))

    def _until_done(self, upload: Callable[[], None]) -> None:
        """Upload, once more after each checkpoint that is found damaged or gone."""
        gone = None
        while True:
            try:
                upload()
            except DamagedCheckpointError as error:
                disown(error.folder, error.fault)
            except RemovedCheckpointError as error:
                if error.folder == gone:  # the look and the upload see different things, as over NFS for a while
                    raise FileNotFoundError(f"{gone} is there and can't be read") from error
                gone = error.folder
            else:
                return

    def _upload(self) -> None:
        newest = self._newest()  # before a look at which one is the best, which may change any time
        self._upload_best(self._job.put_file)
        if newest is None:
            return
        self._store(newest, ArtifactKind.CHECKPOINT, self._job.put_file, self._groups_to_keep)
        self._mirrored = newest.name

    def _upload_best(self, put_file: PutFile) -> None:
        best = self._best()
        if best is not None:
            self._store(best, ArtifactKind.BEST_CHECKPOINT, put_file, lambda name: [name])
            self._best_mirrored = best.name

    def _store(self, folder: Path, kind: ArtifactKind, put_file: PutFile, groups_to_keep: Callable[[str], list[str]]) -> None:
        """Upload a checkpoint's files and make them known, unless an earlier attempt did; forget those of its kind that it replaces.

        Raises:
            DamagedCheckpointError: it is not what its marker says; nothing of it is known.
            RemovedCheckpointError: it is gone; nothing of it is known.
        """
        with _held(folder) as (links, marker):
            known = {artifact.name: artifact.sha256 for artifact in self._job.artifacts(self._job.id, kind, folder.name)}
            if all(known.get(file.name) == file.sha256 for file in marker.files):
                return
            stored: list[tuple[str, StoredBlob]] = []
            try:
                for file in marker.files:
                    stored.append((file.name, put_file(links / file.name)))
                    _check_hash(folder, file, stored[-1][1])
                stored.append((CHECKPOINT_MARKER, put_file(links / CHECKPOINT_MARKER)))
                self._job.add_checkpoint(kind, folder.name, marker.step, stored, groups_to_keep(folder.name))
            except BaseException:
                self._job.discard([blob for _, blob in stored])
                raise

    def _best(self) -> Path | None:
        """The best complete checkpoint, if it is not in the store yet and still here (an earlier attempt's was on another machine)."""
        try:
            best = read_record(self._run / BEST_FILE, BestCheckpoint)
        except ValueError as error:
            logger.warning("job %s: %s is damaged, and removed until the next best checkpoint: %s", self._job.id, BEST_FILE, error)
            (self._run / BEST_FILE).unlink(missing_ok=True)
            return None
        if best is None:
            return None
        folder = checkpoint_dir(self._run, best.step)
        return folder if folder.name != self._best_mirrored and (folder / CHECKPOINT_MARKER).is_file() else None

    def _newest(self) -> Path | None:
        """The newest complete checkpoint, if it is not in the store yet."""
        found = complete_checkpoints(self._run)
        return found[-1] if found and found[-1].name != self._mirrored else None

    def _groups_to_keep(self, newest: str) -> list[str]:
        known = {artifact.group for artifact in self._job.artifacts(self._job.id, ArtifactKind.CHECKPOINT)}
        return sorted(known | {newest})[-self._num_kept :]

    def _try_mirror(self) -> None:
        try:
            self._until_done(self._upload)
        except LeaseLostError:
            logger.info("job %s: lost while mirroring a checkpoint", self._job.id)
        except (OSError, *OUT_OF_REACH) as error:
            logger.warning("job %s: a checkpoint was not mirrored: %s", self._job.id, error)
            self._not_before = time.monotonic() + RETRY_SECONDS


@contextmanager
def _held(folder: Path) -> Iterator[tuple[Path, CheckpointMarker]]:
    """A folder of links to a checkpoint's files, which stay whatever the trainer removes, and the checkpoint's marker.

    Raises:
        DamagedCheckpointError: it is not what its marker says.
        RemovedCheckpointError: the trainer removed it just now.
    """
    links = folder.with_name(f"{MIRRORING_PREFIX}{folder.name}-{secrets.token_hex(4)}")
    links.mkdir()
    try:
        try:
            _link(folder / CHECKPOINT_MARKER, links)
        except FileNotFoundError as error:
            raise RemovedCheckpointError(folder) from error
        try:
            marker = CheckpointMarker.model_validate_json((links / CHECKPOINT_MARKER).read_bytes())
        except ValueError as error:
            raise DamagedCheckpointError(folder, f"{CHECKPOINT_MARKER} is not readable") from error
        missing: list[str] = []
        for file in marker.files:
            try:
                _link(folder / file.name, links)
            except FileNotFoundError:
                missing.append(file.name)
        if missing and (folder / CHECKPOINT_MARKER).is_file():
            raise DamagedCheckpointError(folder, f"{', '.join(missing)} missing")
        if missing:  # the trainer is removing it, the marker first
            raise RemovedCheckpointError(folder)
        yield links, marker
    finally:
        shutil.rmtree(links, ignore_errors=True)


def _link(file: Path, folder: Path) -> None:
    try:
        os.link(file, folder / file.name)
    except FileNotFoundError:
        raise
    except OSError:  # a file system without links
        shutil.copyfile(file, folder / file.name)


def _check_hash(folder: Path, file: CheckpointFile, blob: StoredBlob) -> None:
    if blob.sha256 != file.sha256:
        raise DamagedCheckpointError(folder, f"{file.name} does not match its hash")
