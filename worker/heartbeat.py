"""Every few seconds the worker looks whether it can work, and tells probes and the database what it finds."""

from __future__ import annotations

import logging
import socket
import time
from collections.abc import Callable, Sequence
from contextlib import suppress

from kombu.exceptions import KombuError
from redis.exceptions import RedisError
from sqlalchemy import Engine
from sqlalchemy.exc import SQLAlchemyError

from service.queue import JobQueue
from service.store.blobs import make_blobs
from service.store.session import check_database, make_engine, make_sessions, reading
from service.store.workers import forget_workers, holds_a_job, remove_worker, report_worker
from worker.boot_clock import now
from worker.child_watch import ChildWatch
from worker.consumer_watch import ConsumerWatch
from worker.gpus import GpuReader
from worker.health import RESTART_SECONDS, Health
from worker.rounds import Rounds
from worker.settings import WorkerSettings

logger = logging.getLogger(__name__)

CHECK_TIMEOUT_SECONDS = 2.0
ARTIFACTS_SECONDS = 30.0
"""Pause between looks at an artifact store that is well: each one writes there, which a bucket charges for."""
MISSED_CHECKS = 3
"""So many may be overdue, and take CHECKS_SECONDS in all, before the last one says nothing any more."""
CHECKS_SECONDS = 10.0


class Heartbeat:
    """A daemon thread in the worker's parent process, as the jobs run in its child.

    Args:
        settings: The worker's.
        watch: Told by Celery's consumer.
        name: The worker's, in the store.
        rounds: Other rounds of this process. That they don't end is told to probes and in the log, but keeps the worker from no job.
    """

    def __init__(self, settings: WorkerSettings, watch: ConsumerWatch, name: str, rounds: Sequence[Rounds] = ()) -> None:
        self._settings = settings
        self._watch = watch
        self._name = name
        self._child = ChildWatch()
        self._watched_rounds = rounds
        self._broker = JobQueue(settings.broker_url, timeout_seconds=CHECK_TIMEOUT_SECONDS)
        self._artifacts = make_blobs(settings.artifacts_url, settings.artifacts_root, is_quick=True)
        self._artifacts_at = float("-inf")
        """When to look there next (monotonic seconds)."""
        self._gpus = GpuReader()
        self._rounds = Rounds("heartbeat", self.beat, pause_seconds=settings.health_seconds)
        self._last: tuple[str, ...] | None = None
        self._stuck_since: float | None = None

    def start(self) -> None:
        self._rounds.start()

    def stop(self) -> None:
        """From now on there is no such worker."""
        self._rounds.stop()
        if self._settings.health_file is not None:
            self._settings.health_file.unlink(missing_ok=True)
        with suppress(SQLAlchemyError):  # then its row expires
            self._with_database(self._take_leave)
        self._gpus.close()
        self._broker.close()

    def beat(self) -> None:
        """One look at everything that the worker needs."""
        consumer, broker = self._watch.problem() or self._check_child(), self._check_broker()
        found = [None if consumer is None else f"the worker does not take jobs: {consumer}", broker, self._check_artifacts()]
        reported = [problem for problem in found if problem is not None]
        database = _complaint("database", lambda: self._with_database(lambda engine: self._report(engine, reported)))
        rounds = [one.problem() for one in self._watched_rounds]
        problems = tuple(problem for problem in (*found, database, *rounds) if problem is not None)
        self._log(problems)
        is_stuck = self._is_stuck(consumer is not None and broker is None and database is None and not self._watch.is_shutting_down)
        if self._settings.health_file is not None:
            checked_at = now()
            health = Health(checked_at=checked_at, valid_until=checked_at + self._valid_seconds, problems=problems, is_stuck=is_stuck)
            health.write(self._settings.health_file)

    @property
    def _valid_seconds(self) -> float:
        """For which a heartbeat stands."""
        return MISSED_CHECKS * self._settings.health_seconds + CHECKS_SECONDS

    def _log(self, problems: tuple[str, ...]) -> None:
        if problems == self._last or self._watch.is_shutting_down:  # that is logged by Celery
            return
        if problems:
            logger.warning("not ready: %s", "; ".join(problems))
        elif self._last is not None:
            logger.info("ready again")
        self._last = problems

    def _is_stuck(self, does_not_consume: bool) -> bool:
        """Whether it has not consumed for so long, with nothing outside it to prevent that; a consumer needs some time to reconnect."""
        if not does_not_consume:
            self._stuck_since = None
            return False
        if self._stuck_since is None:
            self._stuck_since = time.monotonic()
        return time.monotonic() - self._stuck_since > RESTART_SECONDS

    def _check_broker(self) -> str | None:
        """Besides the consumer's own connection, which is idle while the worker is busy."""
        return _complaint("broker", self._broker.check)

    def _check_child(self) -> str | None:
        """What keeps the pool's child from its next job. Unknown while the database is away, which is told for itself."""
        message, found = self._watch.message, list[bool]()
        if message is not None:
            with suppress(SQLAlchemyError):
                self._with_database(lambda engine: found.append(self._holds_job(engine)))
            if not found:
                return None
        return self._child.look(message, holds_job=any(found))

    def _holds_job(self, engine: Engine) -> bool:
        with reading(make_sessions(engine)) as session:
            return holds_a_job(session=session, worker_id=self._name)

    def _check_artifacts(self) -> str | None:
        """Without them a job can neither fetch its teacher nor end."""
        if time.monotonic() < self._artifacts_at:
            return None
        problem = _complaint("artifact store", self._artifacts.check_writable)
        if problem is None:
            self._artifacts_at = time.monotonic() + ARTIFACTS_SECONDS
        return problem

    def _with_database(self, act: Callable[[Engine], None]) -> None:
        """With connections that don't outlive the round."""
        engine = make_engine(self._settings.database_url)
        try:
            act(engine)
        finally:
            engine.dispose()

    def _report(self, engine: Engine, problems: Sequence[str]) -> None:
        try:
            check_database(engine)
        except OSError as error:  # of another version's schema: it may well take the report all the same
            with suppress(SQLAlchemyError):
                self._write(engine, [*problems, f"database: {error}"])
            raise
        self._write(engine, problems)

    def _write(self, engine: Engine, problems: Sequence[str]) -> None:
        gpus = self._gpus.read()
        with make_sessions(engine).begin() as session:
            forget_workers(session=session)
            report_worker(
                session=session,
                worker_id=self._name,
                host=socket.gethostname(),
                queues=self._settings.queues,
                problems=problems,
                gpus=gpus,
                valid_seconds=self._valid_seconds,
            )

    def _take_leave(self, engine: Engine) -> None:
        with make_sessions(engine).begin() as session:
            remove_worker(session=session, worker_id=self._name)


def _complaint(part: str, check: Callable[[], None]) -> str | None:
    try:
        check()
    except (SQLAlchemyError, KombuError, RedisError, OSError) as error:
        return f"{part}: {next(iter(str(error).splitlines()), type(error).__name__)}"
    return None
