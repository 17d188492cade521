"""Removes what nobody needs any more: bytes in the artifact store, run directories, old rows. Every worker does; they don't collide."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from functools import cached_property

from service.store.artifacts import remove_finished_checkpoints
from service.store.blobs import Blobs, make_blobs
from service.store.idempotency import forget_keys
from service.store.session import reading
from service.store.unneeded_blobs import forget_unneeded, release_unneeded, take_unneeded
from service.store.unneeded_runs import LocalRun, unneeded_runs
from service.store.webhooks import drop_untaken
from worker.run_dirs import remove_run_dirs, run_dirs_of
from worker.settings import WorkerSettings
from worker.store_rounds import StoreRounds, Turn

logger = logging.getLogger(__name__)

RUN_DIRS_SECONDS = 60.0
"""Pause between looks at the run directories."""
REMOVAL_SECONDS = 10.0
"""A part of a round begins to remove nothing more after this time, since the other parts are to have their turn."""


class Cleaner(StoreRounds):
    """Rounds in the worker's parent process."""

    def __init__(self, settings: WorkerSettings) -> None:
        parts = (
            self._forget_keys,
            self._drop_messages,
            self._drop_finished_checkpoints,
            self._delete_unneeded_blobs,
            self._remove_run_dirs,
        )
        super().__init__("cleaner", settings.database_url, parts, pause_seconds=settings.reaper_seconds)
        self._settings = settings
        self._run_dirs_at = 0.0
        """When to look at the run directories next (monotonic seconds)."""

    @cached_property
    def _blobs(self) -> Blobs:
        return make_blobs(self._settings.artifacts_url, self._settings.artifacts_root, is_quick=True)

    def _forget_keys(self, turn: Turn) -> None:
        with turn.sessions.begin() as session:
            forget_keys(session=session)

    def _drop_messages(self, turn: Turn) -> None:
        """Of webhooks, to nobody or to those that no worker tells any more."""
        with turn.sessions.begin() as session:
            num_dropped = drop_untaken(session=session)
        if num_dropped:
            logger.info("dropped %d webhook messages that no worker had taken for a day", num_dropped)

    def _drop_finished_checkpoints(self, turn: Turn) -> None:
        """Those of jobs that failed or were cancelled so long ago that nobody goes on with them; a job that succeeds drops its own."""
        with turn.sessions.begin() as session:
            keys = remove_finished_checkpoints(session=session, older_than_seconds=self._settings.checkpoint_retention_seconds)
        if keys:
            logger.info("dropped %d files of finished jobs' checkpoints", len(keys))

    def _delete_unneeded_blobs(self, turn: Turn) -> None:
        """Bytes that nothing names any more. What can't be deleted waits some time for its next try, and holds up no other."""
        until = time.monotonic() + REMOVAL_SECONDS
        while time.monotonic() < until:
            with turn.sessions.begin() as session:
                keys = take_unneeded(session=session)
            if not keys:
                return
            gone, failed = self._delete_blobs(turn, keys, until)
            with turn.sessions.begin() as session:
                forget_unneeded(session=session, storage_keys=gone)
                release_unneeded(session=session, storage_keys=keys[len(gone) + len(failed) :])

    def _delete_blobs(self, turn: Turn, keys: Sequence[str], until: float) -> tuple[list[str], list[str]]:
        """Those of the first keys that are gone, and those that could not be deleted."""
        blobs = self._blobs
        gone: list[str] = []
        failed: list[str] = []
        problem = ""
        with turn.waiting():
            for key in keys:
                if time.monotonic() > until:
                    break
                try:
                    blobs.delete(key)
                except Exception as error:  # whatever it is, the others have their turn
                    failed.append(key)
                    problem = f"{key}: {type(error).__name__}: {error}"
                else:
                    gone.append(key)
        if failed:
            logger.warning("%d files in the artifact store can't be deleted now and are tried again later; %s", len(failed), problem)
        return gone, failed

    def _remove_run_dirs(self, turn: Turn) -> None:
        """On this machine's disk: those of jobs that were deleted, that finished long ago, or that have moved to another machine."""
        if time.monotonic() < self._run_dirs_at:
            return

        def unneeded(runs: Mapping[str, LocalRun]) -> set[str]:
            with reading(turn.sessions) as session:
                return unneeded_runs(session=session, runs=runs, retention_seconds=self._settings.checkpoint_retention_seconds)

        names = run_dirs_of(self._settings.runs_root, unneeded)
        with turn.waiting():
            is_all = remove_run_dirs(self._settings.runs_root, names, max_seconds=REMOVAL_SECONDS)
        if is_all:
            self._run_dirs_at = time.monotonic() + RUN_DIRS_SECONDS
