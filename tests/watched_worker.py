"""The worker's Celery app, for tests of what it says about itself: `celery -A tests.watched_worker worker`.

It counts as silent sooner, and its child as hanging. SIGUSR1 cancels its consumer; SIGUSR2 takes away what makes kombu ask the
broker for messages. With CLIPRD_TEST_LOST_ACKS in its environment the connection breaks at as many acknowledgements.
"""

from __future__ import annotations

import os
import signal
from typing import Any

from celery import Celery, bootsteps
from kombu.transport.redis import QoS

from worker import celery_app, child_watch, consumer_watch, heartbeat

consumer_watch.SILENCE_SECONDS = 5.0
heartbeat.CHECKS_SECONDS = 4.0
child_watch.JOBLESS_SECONDS = 2.0


acknowledge = QoS.ack
num_to_lose = int(os.environ.get("CLIPRD_TEST_LOST_ACKS", "0"))


def acknowledge_or_break(self: Any, delivery_tag: str) -> None:
    global num_to_lose  # noqa: PLW0603
    if num_to_lose > 0:
        num_to_lose -= 1
        raise ConnectionResetError("the connection broke")
    acknowledge(self, delivery_tag)


QoS.ack = acknowledge_or_break


class Sabotage(bootsteps.StartStopStep):
    requires = ("celery.worker.consumer.tasks:Tasks",)

    def start(self, parent: Any) -> None:
        signal.signal(signal.SIGUSR1, lambda *_: parent.task_consumer.cancel())
        signal.signal(signal.SIGUSR2, lambda *_: parent.hub.on_tick.clear())


app: Celery = celery_app.app
app.steps["consumer"].add(Sabotage)
