"""Brings back what was lost: jobs whose worker vanished, and messages that never arrived. Every worker runs one; they don't collide."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from datetime import datetime
from typing import Any

from celery import Celery
from kombu import Connection
from sqlalchemy.orm import Session, sessionmaker

from service.store.artifacts import remove_finished_checkpoints
from service.store.blobs import make_blobs
from service.store.idempotency import forget_keys
from service.store.jobs import QueuedJob, deleted_among, jobs_to_send, requeue_expired
from service.store.session import database_now, make_engine, make_sessions, reading
from service.store.unneeded_blobs import forget_unneeded, unneeded_keys
from worker import lease_guard
from worker.held_job import OUT_OF_REACH
from worker.rounds import Rounds
from worker.run_dirs import remove_deleted
from worker.settings import WorkerSettings
from worker.tasks import BROKER_AWAY, send
from worker.webhooks import deliver_webhooks

logger = logging.getLogger(__name__)

RUN_DIRS_SECONDS = 60.0
"""Pause between looks at the run directories."""
MAX_REMOVAL_SECONDS = 5.0
"""A round begins to remove no further one after this time, as leases that run out must not wait for it."""


class Reaper:
    """A daemon thread in the worker's parent process."""

    def __init__(self, app: Celery, settings: WorkerSettings) -> None:
        self._app = app
        self._settings = settings
        self._run_dirs_at = 0.0
        """When to look at the run directories next (monotonic seconds)."""
        self._clock: tuple[float, datetime] | None = None
        """When the database's clock was last asked for (`lease_guard.now`), and what it said."""
        self._patient_until = 0.0
        """Until then no lease counts as run out (`lease_guard.now`)."""
        self._rounds = Rounds("reaper", self.reap, pause_seconds=settings.reaper_seconds)

    def start(self) -> None:
        self._rounds.start()

    def stop(self) -> None:
        self._rounds.stop()

    def reap(self) -> None:
        """One round: take back what expired, send again what is queued and may have lost its message, clean up, and deliver webhooks.

        Whatever fails in one part, the others have their turn. No connection stays open between rounds: a child forked in between must
        not inherit one (SQLite forbids it).
        """
        engine = make_engine(self._settings.database_url)
        try:
            sessions = make_sessions(engine)
            for part in (
                self._requeue_expired,
                self._forget_keys,
                self._send_again,
                self._drop_finished_checkpoints,
                self._delete_unneeded_blobs,
                self._remove_run_dirs,
                self._deliver_webhooks,
            ):
                try:
                    part(sessions)
                except OUT_OF_REACH as error:
                    logger.warning("reaper, %s: a store is out of reach (%s)", part.__name__.strip("_"), type(error).__name__)
                except Exception:  # whatever it is, the next round may do better
                    logger.exception("reaper, %s: failed; the rest of the round goes on", part.__name__.strip("_"))
        finally:
            engine.dispose()

    def _requeue_expired(self, sessions: sessionmaker[Session]) -> None:
        with sessions.begin() as session:
            asked_at = lease_guard.now()
            now = database_now(session)
            self._look_at_clock(asked_at, now)
            if asked_at < self._patient_until:
                return
            expired = requeue_expired(session=session, now=now)
        for job in expired:
            logger.warning("job %s: its worker vanished; it is queued again", job.job_id)
        send(self._app, sessions, expired)

    def _look_at_clock(self, asked_at: float, now: datetime) -> None:
        """A clock that is set forward, as when another database server takes over, makes leases run out whose holders are well and train
        on until they hear of it; so they get the time to renew them. A jump of less than a heartbeat no lease runs out by, since it lasts
        for two at least."""
        before, self._clock = self._clock, (asked_at, now)
        if before is None:
            return
        jumped = (now - before[1]).total_seconds() - (asked_at - before[0])
        if jumped > self._settings.heartbeat_seconds:
            logger.warning("the database's clock jumped forward by %.0f s; no lease counts as run out for now", jumped)
            self._patient_until = asked_at + self._settings.lease_seconds

    def _forget_keys(self, sessions: sessionmaker[Session]) -> None:
        with sessions.begin() as session:
            forget_keys(session=session)

    def _send_again(self, sessions: sessionmaker[Session]) -> None:
        with reading(sessions) as session:
            waiting = jobs_to_send(session=session, older_than_seconds=self._settings.resend_seconds)
        try:
            missing = self._without_message(waiting)
        except BROKER_AWAY as error:
            logger.warning("the broker is out of reach (%s); %d jobs wait for it", error, len(waiting))
            return
        send(self._app, sessions, missing)

    def _deliver_webhooks(self, sessions: sessionmaker[Session]) -> None:
        secret = self._settings.webhook_secret
        deliver_webhooks(sessions, self._settings.webhook_urls, None if secret is None else secret.get_secret_value())

    def _drop_finished_checkpoints(self, sessions: sessionmaker[Session]) -> None:
        """Those of jobs that failed or were cancelled so long ago that nobody goes on with them; a job that succeeds drops its own."""
        with sessions.begin() as session:
            keys = remove_finished_checkpoints(session=session, older_than_seconds=self._settings.checkpoint_retention_seconds)
        if keys:
            logger.info("dropped %d files of finished jobs' checkpoints", len(keys))

    def _delete_unneeded_blobs(self, sessions: sessionmaker[Session]) -> None:
        """Bytes that nothing names any more, until one can't be deleted; the next round goes on there."""
        with reading(sessions) as session:
            keys = unneeded_keys(session=session)
        if not keys:
            return
        blobs = make_blobs(self._settings.artifacts_url, self._settings.artifacts_root)
        gone: list[str] = []
        try:
            for key in keys:
                blobs.delete(key)
                gone.append(key)
        finally:
            with sessions.begin() as session:
                forget_unneeded(session=session, storage_keys=gone)

    def _remove_run_dirs(self, sessions: sessionmaker[Session]) -> None:
        """Those of jobs that were deleted, on this machine's disk."""
        if time.monotonic() < self._run_dirs_at:
            return

        def deleted(names: Sequence[str]) -> set[str]:
            with reading(sessions) as session:
                return deleted_among(session=session, job_ids=names)

        if remove_deleted(self._settings.runs_root, deleted, max_seconds=MAX_REMOVAL_SECONDS):
            self._run_dirs_at = time.monotonic() + RUN_DIRS_SECONDS

    def _without_message(self, waiting: Sequence[QueuedJob]) -> list[QueuedJob]:
        """Those of queues that hold fewer messages than jobs wait. In the others each job may just wait its turn: sending them again
        and again for days would fill the broker."""
        if not waiting:
            return []
        by_queue: dict[str, list[QueuedJob]] = {}
        for job in waiting:
            by_queue.setdefault(job.queue, []).append(job)
        with self._app.connection_for_write() as connection:
            short = [jobs for queue, jobs in by_queue.items() if num_messages(connection, queue) < len(jobs)]
        return [job for jobs in short for job in jobs]


def num_messages(connection: Connection, queue: str) -> int:
    """Messages that wait in a queue of the broker; one that does not exist (Redis removes empty ones) has none."""
    channel: Any = connection.default_channel  # kombu's stubs leave out what AMQP-like channels have in common
    try:
        return int(channel.queue_declare(queue=queue, passive=True).message_count)
    except connection.channel_errors:
        return 0
