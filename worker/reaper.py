"""Brings back what was lost: jobs whose worker vanished, and messages that never arrived. Every worker runs one; they don't collide.

What may take long, deliveries and deletions, has rounds of its own (`worker.webhooks`, `worker.cleaner`), so that no lease waits for it.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from datetime import datetime
from itertools import takewhile

from service.logs import about
from service.queue import JobQueue
from service.store.jobs import QueuedJob, jobs_to_send, mark_sent, num_to_send, requeue_expired, requeue_lost
from service.store.session import database_now, reading
from worker import boot_clock
from worker.holds import Hold, Holds
from worker.run_cookie import kill_processes
from worker.settings import WorkerSettings
from worker.store_rounds import StoreRounds, Turn
from worker.tasks import BROKER_AWAY

logger = logging.getLogger(__name__)

BROKER_TIMEOUT_SECONDS = 2.0
"""A broker that says nothing must hold up leases no longer."""


KILLED = "The worker's process that ran the job was killed, most likely because the machine ran out of memory; the kernel's log tells."


class Reaper(StoreRounds):
    """Rounds in the worker's parent process: take back what its children held that were killed, and what expired, and send again what is
    queued and may have lost its message.

    Args:
        settings: The worker's.
        holds: What its children hold.
    """

    def __init__(self, settings: WorkerSettings, holds: Holds) -> None:
        parts = (self._requeue_lost, self._requeue_expired, self._send_again)
        super().__init__("reaper", settings.database_url, parts, pause_seconds=settings.reaper_seconds)
        self._settings = settings
        self._holds = holds
        self._queue = JobQueue(settings.broker_url, timeout_seconds=BROKER_TIMEOUT_SECONDS)
        self._clock: tuple[float, datetime] | None = None
        """When the database's clock was last asked for (`boot_clock.now`), and what it said."""
        self._patient_until = 0.0
        """Until then no lease counts as run out (`boot_clock.now`)."""

    def close(self) -> None:
        """Drop the connections to the broker."""
        self._queue.close()

    def _requeue_lost(self, turn: Turn) -> None:
        for hold in self._holds.of_the_dead():
            self._take_back(turn, hold)
            self._holds.forget(hold)

    def _take_back(self, turn: Turn, hold: Hold) -> None:
        """The lease of a child that has ended, unless it had done with it. Its guard has killed the run most likely; this makes sure."""
        with turn.waiting():
            survivors = kill_processes(hold.cookie)
        if survivors:
            logger.error(
                "processes %s of a killed worker process survive SIGKILL, as they hang in the kernel; its lease runs out", survivors
            )
            return
        with turn.sessions.begin() as session:
            lost = requeue_lost(session=session, lease_token=hold.lease_token, cause=KILLED)
        for job in lost.lost:
            logger.warning("job %s: the process that ran it was killed; it is %s now", job.id, job.state, extra=about(job.id, job.attempt))
        self._send(turn, lost.queued)

    def _requeue_expired(self, turn: Turn) -> None:
        with turn.sessions.begin() as session:
            asked_at = boot_clock.now()
            now = database_now(session)
            self._look_at_clock(asked_at, now)
            if asked_at < self._patient_until:
                return
            expired = requeue_expired(session=session, now=now)
        for job in expired.lost:
            logger.warning("job %s: its worker vanished; it is %s now", job.id, job.state, extra=about(job.id, job.attempt))
        self._send(turn, expired.queued)

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

    def _send_again(self, turn: Turn) -> None:
        """Of queues that hold fewer messages than jobs wait. In the others each job may just wait its turn: sending them again and again
        for days would fill the broker."""
        seconds = self._settings.resend_seconds
        with reading(turn.sessions) as session:
            waiting = num_to_send(session=session, older_than_seconds=seconds)
        try:
            num_messages = self._queue.num_messages(list(waiting))
        except BROKER_AWAY as error:
            logger.warning("the broker is out of reach (%s); %d jobs wait for it", error, sum(waiting.values()))
            return
        short = [queue for queue, num_jobs in waiting.items() if num_messages[queue] < num_jobs]
        if short:
            with reading(turn.sessions) as session:
                missing = jobs_to_send(session=session, queues=short, older_than_seconds=seconds)
            self._send(turn, missing)

    def _send(self, turn: Turn, queued: Sequence[QueuedJob]) -> None:
        sent = list(takewhile(lambda job: self._queue.send([job]), queued))
        if sent:
            with turn.sessions.begin() as session:
                mark_sent(session=session, job_ids=[job.job_id for job in sent])
