"""The Celery app over Redis: `celery -A worker.celery_app worker`. It is built when first asked for, not at import."""

from __future__ import annotations

from functools import cache
from typing import Any

from celery import Celery, signals
from kombu import Queue

from service.logs import LogFormat, configure
from worker.cleaner import Cleaner
from worker.consumer_watch import ConsumerWatch, watching_step
from worker.heartbeat import Heartbeat
from worker.holds import Holds
from worker.reaper import Reaper
from worker.rounds import stop_all
from worker.settings import WorkerSettings
from worker.shutdown import ShutdownFlag
from worker.store_rounds import StoreRounds
from worker.tasks import RUN_JOB, run_job, worker_name
from worker.webhooks import Messenger

_connected: list[Any] = []
"""Celery keeps weak references to signal receivers only."""


def create_app(settings: WorkerSettings, flag: ShutdownFlag, name: str, holds: Holds) -> Celery:
    """An app with the task `cliprd.run_job` that runs one job at a time, as the worker of this name.

    A message is acknowledged on receipt, since Redis would deliver it again after an hour and training takes days; what makes a
    job survive its worker is the lease in the store. A busy worker leaves further messages in the queue, for others.
    """
    app = Celery("cliprd", broker=settings.broker_url, set_as_current=False)
    app.conf.update(
        accept_content=["json"],
        task_serializer="json",
        task_ignore_result=True,
        task_acks_late=False,
        task_queues=[Queue(name) for name in settings.queues],
        task_default_queue=settings.queues[0],
        task_create_missing_queues=True,
        worker_concurrency=1,
        worker_disable_prefetch=True,
        worker_prefetch_multiplier=1,
        worker_send_task_events=False,
        worker_enable_remote_control=False,
        broker_connection_retry_on_startup=True,
        task_publish_retry_policy={"max_retries": 1, "interval_start": 0.2},
        broker_transport_options={"socket_connect_timeout": 5, "socket_keepalive": True},
    )

    @app.task(name=RUN_JOB, shared=False)  # else every later app of the process would get this one
    def _run_job(job_id: str) -> None:
        run_job(app, settings, flag.is_raised, holds, worker=name, job_id=job_id)

    return app


def connect_signals(app: Celery, settings: WorkerSettings, flag: ShutdownFlag, name: str, holds: Holds) -> None:
    """In the worker's parent process: run a heartbeat and what else is done beside the jobs, and pass the order to shut down on to the
    running job."""
    watch = ConsumerWatch(settings.queues)
    app.steps["consumer"].add(watching_step(watch))
    reaper = Reaper(settings, holds)
    rounds: list[StoreRounds] = [reaper, Cleaner(settings), *(Messenger(settings, url) for url in settings.webhook_urls)]
    heartbeat = Heartbeat(settings, watch, name, rounds)

    def on_setup_logging(**_: Any) -> None:
        configure(settings.log_format)

    def on_setup(**_: Any) -> None:
        heartbeat.start()  # before there is a consumer, so that it can tell why there is none

    def on_ready(**_: Any) -> None:
        for one in rounds:
            one.start()

    def on_shutting_down(**_: Any) -> None:
        flag.raise_()
        watch.is_shutting_down = True

    def on_shutdown(**_: Any) -> None:
        stop_all(rounds)
        reaper.close()
        heartbeat.stop()

    if settings.log_format is LogFormat.JSON:
        signals.setup_logging.connect(on_setup_logging)  # a receiver keeps Celery's own set-up away
    signals.celeryd_after_setup.connect(on_setup)
    signals.worker_ready.connect(on_ready)
    signals.worker_shutting_down.connect(on_shutting_down)
    signals.worker_shutdown.connect(on_shutdown)
    _connected.extend([on_setup_logging, on_setup, on_ready, on_shutting_down, on_shutdown])


@cache
def _worker_app() -> Celery:
    settings, flag, name, holds = WorkerSettings(), ShutdownFlag(), worker_name(), Holds()
    app = create_app(settings, flag, name, holds)
    connect_signals(app, settings, flag, name, holds)
    return app


def __getattr__(name: str) -> Celery:
    """`app`, which the `celery` command looks for."""
    if name == "app":
        return _worker_app()
    raise AttributeError(name)
