"""Supervises one attempt at one job: prepares the run directory, starts training, reports on it, stops it, records how it ended."""

from __future__ import annotations

import logging
import shutil
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from cliprd_core.run_dir import (
    BEST_FILE,
    CHECKPOINTS_DIR,
    DISK_FULL_ERRNOS,
    ERROR_FILE,
    EXPORT_DIR,
    RESULT_FILE,
    SPEC_FILE,
    ErrorReason,
    ErrorRecord,
    ResultRecord,
    complete_checkpoints,
    step_of,
    write_atomically,
)
from cliprd_core.store_removal import evict
from service.store.blobs import BlobsRefusedError
from service.store.jobs import LeaseLostError, Outcome, QueuedJob
from worker.files import TEACHERS_DIR, TeacherGoneError, restore_checkpoint, with_fetched_teachers
from worker.held_job import OUT_OF_REACH, DamagedExportError, HeldJob
from worker.lease import LeaseKeeper
from worker.lease_guard import LeaseGuard
from worker.mirror import CheckpointMirror
from worker.outcome import StopAskedError, StopCause, decide, last_words, of_interrupted
from worker.process import TrainingProcess
from worker.reports import Reports
from worker.run_dirs import in_use
from worker.settings import WorkerSettings

logger = logging.getLogger(__name__)

REQUEST_POLL_SECONDS = 1.0
UPLOAD_SECONDS = 600.0
"""A run that ends as its time is over has so long for its model to be stored, as an artifact store that is away for minutes is no reason to
fail it."""
MAX_MIRROR_PAUSE_SECONDS = 5.0
"""Longest pause between tries to mirror the last checkpoint."""

Launch = Callable[[Path, HeldJob, str], TrainingProcess]
"""Starts the training processes of a prepared run directory, with the given cookie."""


class Supervisor:
    """One attempt. Use `run` once, in the main thread (the kernel ties the training processes' life to the thread that starts them).

    Args:
        job: The job, just claimed.
        settings: The worker's.
        should_stop: Whether the worker is shutting down; asked several times a second.
        launch: How training starts.
        cookie: Of this run alone (see `run_cookie`).
    """

    def __init__(self, job: HeldJob, settings: WorkerSettings, should_stop: Callable[[], bool], launch: Launch, cookie: str) -> None:
        self._job = job
        self._settings = settings
        self._should_stop = should_stop
        self._launch = launch
        self._run = (settings.runs_root / job.id).resolve()
        self._cookie = cookie
        self._process: TrainingProcess | None = None
        self._mirror = CheckpointMirror(job, self._run, settings.mirrored_checkpoints)
        self._reports = Reports(job, self._run)
        self._requests_polled_at = 0.0
        self._stop_at = time.monotonic() + job.seconds_left
        self._shutdown_at: float | None = None

    def run(self) -> list[QueuedJob]:
        """Work on the job until it ends, is given back or is lost.

        Returns:
            Jobs that are to be sent to the broker now: those that waited for this one, or this one if it was given back.
        """
        guard = LeaseGuard(self._cookie, self._settings.lease_seconds, since=self._job.held_since)
        keeper = LeaseKeeper(
            self._job.renew,
            self._kill,
            lease_seconds=self._settings.lease_seconds,
            heartbeat_seconds=self._settings.heartbeat_seconds,
            since=self._job.held_since,
            on_renewed=guard.renewed,
        )
        self._job.is_lost = lambda: keeper.is_lost
        self._job.check_stop = self._check_stop
        self._job.tell = self._reports.say
        try:
            with guard, keeper:
                return self._attempt(keeper)
        except LeaseLostError:
            logger.warning("job %s: attempt %d lost its lease and is stopped", self._job.id, self._job.attempt)
            return []
        finally:
            self._kill()

    def _kill(self) -> None:
        if self._process is not None:
            self._process.kill()

    def _attempt(self, keeper: LeaseKeeper) -> list[QueuedJob]:
        try:
            with in_use(self._run, self._job.attempt):
                try:
                    return self._end(self._train(keeper))
                except StopAskedError as stop:
                    return self._end(of_interrupted(stop))
        except LeaseLostError:
            raise
        except TeacherGoneError as error:
            return self._fail(ErrorRecord(reason=ErrorReason.TEACHER_UNAVAILABLE, message=str(error)))
        except DamagedExportError as error:
            return self._fail(ErrorRecord(reason=ErrorReason.INTERNAL, message=str(error)))
        except Exception as error:
            logger.exception("job %s: the supervisor failed", self._job.id)
            self._kill()
            if isinstance(error, OSError) and error.errno in DISK_FULL_ERRNOS:
                message = f"The worker's disk or the artifact store is full ({error}). Free space there."
                return self._fail(ErrorRecord(reason=ErrorReason.DISK_FULL, message=message, detail=traceback.format_exc()))
            message = f"The worker could not run the job: {type(error).__name__}: {error}"
            return self._fail(ErrorRecord(reason=ErrorReason.INTERNAL, message=message, detail=traceback.format_exc()))

    def _train(self, keeper: LeaseKeeper) -> Outcome | None:
        """How the job ended, or None if it is to be given back.

        Raises:
            StopAskedError: the run is to stop before its training has started.
        """
        if keeper.is_lost:  # this process was stopped since its claim: the run directory may be another attempt's by now
            raise LeaseLostError(self._job.id)
        self._prepare()
        self._evict_teacher_stores()
        if keeper.is_lost:
            raise LeaseLostError(self._job.id)
        self._process = self._launch(self._run, self._job, self._cookie)
        logger.info("job %s: attempt %d runs as process %d in %s", self._job.id, self._job.attempt, self._process.pid, self._run)
        self._job.mark_started()
        cause = self._supervise(keeper, self._process)
        self._process.kill()  # what the run left behind, such as data loaders
        return decide(self._run, self._process.report(), cause)

    def _end(self, outcome: Outcome | None) -> list[QueuedJob]:
        self._say_last_words(outcome)
        self._reports.drain()
        return self._release() if outcome is None else self._finish(outcome)

    def _fail(self, error: ErrorRecord) -> list[QueuedJob]:
        """End a run of which something here failed. Its records may be what failed, so they are not asked for again."""
        self._say_last_words(error)
        try:
            self._reports.drain_log()
        except LeaseLostError:
            raise
        except Exception:  # that the job failed and why must be told all the same
            logger.exception("job %s: its log could not be written", self._job.id)
        return self._finish(error)

    def _say_last_words(self, outcome: Outcome | None) -> None:
        if isinstance(outcome, ErrorRecord):
            self._reports.say(last_words(outcome, self._job.attempt, is_last_attempt=self._job.is_last_attempt))

    def _prepare(self) -> None:
        """Make the run directory ready; what an earlier attempt left in it stays, but for its verdicts.

        Which checkpoint is the best, the trainer says anew: attempts on other machines may have found a better one since.
        """
        for name in (RESULT_FILE, ERROR_FILE, BEST_FILE):
            (self._run / name).unlink(missing_ok=True)
        self._mirror.sweep()
        spec = with_fetched_teachers(self._job, self._run)
        write_atomically(self._run / SPEC_FILE, spec.model_dump_json(indent=2))
        restored = restore_checkpoint(self._job, self._run)
        if restored is not None:
            logger.info("job %s: restored the mirrored checkpoint of step %d", self._job.id, restored)

    def _evict_teacher_stores(self) -> None:
        """Make room; a folder that can't be changed is no reason not to train."""
        try:
            evicted = evict(self._settings.teacher_store_root, self._settings.teacher_store_max_bytes)
        except OSError:
            logger.exception("job %s: teacher stores over the limit could not be deleted", self._job.id)
            return
        for store in evicted:
            logger.info("job %s: deleted teacher store %s (%d bytes) to make room", self._job.id, store.key, store.num_bytes_on_disk)

    def _supervise(self, keeper: LeaseKeeper, process: TrainingProcess) -> StopCause | None:
        """Report until the run ends; ask it to stop where needed, and make it stop where that doesn't help.

        Returns:
            Why it was asked to stop, or None if it wasn't.
        """
        cause: StopCause | None = None
        kill_at = float("inf")
        while not process.wait(self._settings.poll_seconds):
            if keeper.is_lost:
                raise LeaseLostError(self._job.id)
            if cause is None:
                cause = self._stop_cause()
                if cause is not None:
                    logger.info("job %s: stopping (%s)", self._job.id, cause.name.lower())
                    process.terminate()
                    kill_at = time.monotonic() + self._settings.grace_seconds
            if time.monotonic() > kill_at:
                logger.warning("job %s: not stopped after %.0f s; killing it", self._job.id, self._settings.grace_seconds)
                process.kill()
            self._reports.pump()
            self._mirror.start()
        return cause

    def _stop_cause(self) -> StopCause | None:
        if self._should_stop():
            self._shutdown_at = self._shutdown_at or time.monotonic()
            return StopCause.SHUTDOWN
        if time.monotonic() > self._stop_at:
            return StopCause.TIMEOUT
        if time.monotonic() - self._requests_polled_at < REQUEST_POLL_SECONDS:
            return None
        self._requests_polled_at = time.monotonic()
        try:
            return self._job.requested_stop()
        except OUT_OF_REACH:
            return None  # asked again in a moment

    def _check_stop(self) -> None:
        """Between two parts of a long transfer: also tell what is new.

        Raises:
            StopAskedError: the run is to stop.
        """
        self._reports.pump()
        cause = self._stop_cause()
        if cause is not None:
            raise StopAskedError(cause)

    def _mirror_last(self) -> None:
        """So that the next attempt may be on another machine. Tried for as long as the grace period, which a shutdown has begun already;
        in vain where the store refuses."""
        until = (self._shutdown_at or time.monotonic()) + self._settings.grace_seconds
        pause = 0.2
        while True:
            try:
                self._mirror.mirror()
            except (OSError, *OUT_OF_REACH) as error:
                if isinstance(error, BlobsRefusedError) or time.monotonic() + pause > until:
                    logger.exception("job %s: its last checkpoint was not mirrored", self._job.id)
                    return
                logger.warning("job %s: its last checkpoint was not mirrored (%s); trying again in %.1f s", self._job.id, error, pause)
            else:
                return
            time.sleep(pause)
            pause = min(2 * pause, MAX_MIRROR_PAUSE_SECONDS)

    def _release(self) -> list[QueuedJob]:
        self._drop_teachers()
        self._mirror_last()
        released = self._job.release()
        logger.info("job %s: given back", self._job.id)
        return [] if released is None else [released]

    def _remove_checkpoints(self) -> None:
        """Of a job that succeeded, all but those that its spec wants kept at equal distances."""
        every_steps = self._job.spec.training.keep_checkpoints.every_steps
        kept = [] if every_steps is None else [one for one in complete_checkpoints(self._run) if step_of(one) % every_steps == 0]
        if not kept:
            shutil.rmtree(self._run / CHECKPOINTS_DIR, ignore_errors=True)
            return
        for folder in (self._run / CHECKPOINTS_DIR).iterdir():
            if folder not in kept:
                shutil.rmtree(folder, ignore_errors=True)

    def _drop_teachers(self) -> None:
        """Those that were fetched, which the next attempt fetches anew; while the lease is held, as that attempt may start here."""
        shutil.rmtree(self._run / TEACHERS_DIR, ignore_errors=True)

    def _finish(self, outcome: Outcome) -> list[QueuedJob]:
        self._drop_teachers()
        files: list[Path] = []
        if isinstance(outcome, ResultRecord):
            self._stop_at = max(self._stop_at, time.monotonic() + UPLOAD_SECONDS)
            self._mirror.mirror_best()
            files = [self._run / EXPORT_DIR / name for name in outcome.export_files]
        else:
            self._mirror_last()  # for a retry
        queued = self._job.finish(outcome, files)
        logger.info("job %s: ended: %s", self._job.id, outcome)
        if isinstance(outcome, ResultRecord):  # the artifact store has what matters of these
            self._remove_checkpoints()
        return queued
