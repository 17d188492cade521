"""Sending jobs to the workers: a message by the task's name that holds the job's id and nothing else."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from functools import cached_property
from typing import Any

from celery import Celery
from kombu import Connection
from kombu.exceptions import KombuError
from redis.exceptions import RedisError

from service.store.transitions import QueuedJob

logger = logging.getLogger(__name__)

RUN_JOB_TASK = "cliprd.run_job"


class JobQueue:
    """The broker, as far as the service needs it. Connects when something is first sent."""

    def __init__(self, broker_url: str, *, timeout_seconds: float) -> None:
        self._broker_url = broker_url
        self._timeout_seconds = timeout_seconds

    @cached_property
    def _app(self) -> Celery:
        app = Celery("cliprd-service", broker=self._broker_url, set_as_current=False)
        timeouts = {"socket_connect_timeout": self._timeout_seconds, "socket_timeout": self._timeout_seconds}
        is_redis = self._broker_url.startswith(("redis", "unix"))
        app.conf.update(
            broker_connection_timeout=self._timeout_seconds,
            broker_transport_options=timeouts if is_redis else {},
            task_ignore_result=True,
        )
        return app

    def send(self, queued: Sequence[QueuedJob]) -> bool:
        """Send the messages of jobs that became claimable. False: the broker is down, which is logged; the jobs' rows are safe, and the
        reaper sends what did not arrive."""
        retry_once = {"max_retries": 1, "interval_start": 0, "interval_max": 0}
        for number, job in enumerate(queued):
            try:
                self._app.send_task(RUN_JOB_TASK, args=[job.job_id], queue=job.queue, retry=True, retry_policy=retry_once)
            except (KombuError, RedisError, OSError, AttributeError) as error:  # the last: of a channel whose connection broke before
                rest = len(queued) - number
                logger.warning("%d jobs are stored but their messages could not be sent (%s); the reaper will send them", rest, error)
                return False
        return True

    def num_messages(self, queues: Sequence[str]) -> dict[str, int]:
        """Messages that wait in each of these queues; one that does not exist (Redis removes empty ones) has none.

        Raises:
            KombuError, RedisError or OSError: the broker doesn't answer.
        """
        if not queues:
            return {}
        with self._app.connection_for_write() as connection:
            self._ensure(connection)
            return {queue: _num_messages(connection, queue) for queue in queues}

    def check(self) -> None:
        """Raises:
        KombuError, RedisError or OSError: the broker doesn't answer.
        """
        with self._app.connection_for_write() as connection:
            self._ensure(connection)

    def _ensure(self, connection: Connection) -> None:
        connection.ensure_connection(max_retries=1, interval_start=0, timeout=math.ceil(self._timeout_seconds))

    def close(self) -> None:
        """Drop the connections."""
        if "_app" in self.__dict__:
            self._app.close()


def _num_messages(connection: Connection, queue: str) -> int:
    channel: Any = connection.default_channel  # kombu's stubs leave out what AMQP-like channels have in common
    try:
        return int(channel.queue_declare(queue=queue, passive=True).message_count)
    except connection.channel_errors:
        return 0
