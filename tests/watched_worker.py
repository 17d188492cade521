"""The worker's Celery app, for tests of what it says about itself: `celery -A tests.watched_worker worker`.

It counts as silent sooner, and its child as hanging. SIGUSR1 cancels its consumer; SIGUSR2 takes away what makes kombu ask the
broker for messages.
"""

from __future__ import annotations

import signal
from typing import Any

from celery import Celery, bootsteps

from worker import celery_app, child_watch, consumer_watch, heartbeat

consumer_watch.SILENCE_SECONDS = 5.0
heartbeat.CHECKS_SECONDS = 4.0
child_watch.JOBLESS_SECONDS = 2.0


class Sabotage(bootsteps.StartStopStep):
    requires = ("celery.worker.consumer.tasks:Tasks",)

    def start(self, parent: Any) -> None:
        signal.signal(signal.SIGUSR1, lambda *_: parent.task_consumer.cancel())
        signal.signal(signal.SIGUSR2, lambda *_: parent.hub.on_tick.clear())


app: Celery = celery_app.app
app.steps["consumer"].add(Sabotage)
