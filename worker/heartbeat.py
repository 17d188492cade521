"""Every few seconds the worker looks whether it can work, and tells what it finds."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from kombu.exceptions import KombuError
from redis.exceptions import RedisError
from sqlalchemy.exc import SQLAlchemyError

from service.queue import JobQueue
from service.store.session import check_database, make_engine
from worker.consumer_watch import ConsumerWatch
from worker.health import RESTART_SECONDS, Health
from worker.rounds import Rounds
from worker.settings import WorkerSettings

logger = logging.getLogger(__name__)

CHECK_TIMEOUT_SECONDS = 2.0
MISSED_CHECKS = 3
"""So many may be overdue, and take CHECKS_SECONDS in all, before a health file expires."""
CHECKS_SECONDS = 10.0


class Heartbeat:
    """A daemon thread in the worker's parent process, as the jobs run in its child.

    Args:
        settings: The worker's.
        watch: Told by Celery's consumer.
    """

    def __init__(self, settings: WorkerSettings, watch: ConsumerWatch) -> None:
        self._settings = settings
        self._watch = watch
        self._rounds = Rounds("heartbeat", self.beat, pause_seconds=settings.health_seconds)
        self._last: tuple[str, ...] | None = None
        self._stuck_since: float | None = None

    def start(self) -> None:
        self._rounds.start()

    def stop(self) -> None:
        """From now on there is no worker here."""
        self._rounds.stop()
        if self._settings.health_file is not None:
            self._settings.health_file.unlink(missing_ok=True)

    def beat(self) -> None:
        """One look at everything that the worker needs."""
        consumer = self._watch.problem()
        outside = [found for check in (self._check_broker, self._check_database) if (found := check()) is not None]
        problems = (*([] if consumer is None else [f"the worker does not take jobs: {consumer}"]), *outside)
        if problems != self._last:
            if problems:
                logger.warning("not ready: %s", "; ".join(problems))
            elif self._last is not None:
                logger.info("ready again")
        self._last = problems
        is_stuck = self._is_stuck(consumer is not None and not outside and not self._watch.is_shutting_down)
        if self._settings.health_file is not None:
            now = time.time()
            valid_until = now + MISSED_CHECKS * self._settings.health_seconds + CHECKS_SECONDS
            Health(checked_at=now, valid_until=valid_until, problems=problems, is_stuck=is_stuck).write(self._settings.health_file)

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
        queue = JobQueue(self._settings.broker_url, timeout_seconds=CHECK_TIMEOUT_SECONDS)
        try:
            return _complaint("broker", queue.check)
        finally:
            queue.close()

    def _check_database(self) -> str | None:
        engine = make_engine(self._settings.database_url)
        try:
            return _complaint("database", lambda: check_database(engine))
        finally:
            engine.dispose()


def _complaint(part: str, check: Callable[[], None]) -> str | None:
    try:
        check()
    except (SQLAlchemyError, KombuError, RedisError, OSError) as error:
        return f"{part}: {next(iter(str(error).splitlines()), type(error).__name__)}"
    return None
