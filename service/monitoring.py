"""What `/metrics` tells Prometheus: jobs as the database has them, and how long this process takes to answer."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Histogram
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector
from sqlalchemy.orm import Session, sessionmaker
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.logs import set_request
from service.store.session import reading
from service.store.statistics import job_statistics

BUCKETS_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
_JOB_PATH = re.compile(r"/jobs/([0-9a-z-]{8,64})(?:/|$)")


class JobCollector(Collector):
    """Asks the database at every scrape, so that any API process tells the whole truth."""

    def __init__(self, sessions: sessionmaker[Session]) -> None:
        self._sessions = sessions

    def describe(self) -> list[GaugeMetricFamily]:
        """Nothing: else registering would ask the database."""
        return []

    def collect(self) -> Iterator[GaugeMetricFamily]:
        with reading(self._sessions) as session:
            found = job_statistics(session=session)
        jobs = GaugeMetricFamily("cliprd_jobs", "Jobs there are.", labels=["state", "queue"])
        attempts = GaugeMetricFamily("cliprd_attempts", "Attempts of the jobs there are.", labels=["queue"])
        lost = GaugeMetricFamily("cliprd_lost_attempts", "Attempts lost with their worker or its training process.", labels=["queue"])
        oldest = GaugeMetricFamily("cliprd_queue_age_seconds", "How long the longest queued job has waited.", labels=["queue"])
        expired = GaugeMetricFamily("cliprd_expired_leases", "Running jobs whose worker is overdue.", value=found.num_expired_leases)
        speed = GaugeMetricFamily("cliprd_samples_per_second", "Pairs a second of each running job.", labels=["job_id", "queue"])
        for (state, queue), count in found.num_jobs.items():
            jobs.add_metric([state, queue], count)
        for queue, totals in found.queues.items():
            attempts.add_metric([queue], totals.num_attempts)
            lost.add_metric([queue], totals.num_lost_attempts)
            oldest.add_metric([queue], totals.oldest_seconds)
        for running in found.running:
            speed.add_metric([running.job_id, running.queue], running.samples_per_second)
        yield from (jobs, attempts, lost, oldest, expired, speed)


class RequestMonitor:
    """Middleware: measures requests by their route, and tells the logs what they are about."""

    def __init__(self, app: ASGIApp, registry: CollectorRegistry) -> None:
        self.app = app
        self._seconds = Histogram(
            "cliprd_request_seconds",
            "Seconds from a request to the end of its answer.",
            labelnames=["method", "route", "status"],
            buckets=BUCKETS_SECONDS,
            registry=registry,
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        found = _JOB_PATH.search(scope["path"])
        set_request(request=f"{scope['method']} {scope['path']}", **({"job_id": found[1]} if found else {}))
        started = time.perf_counter()
        status = 500  # where nothing is sent

        async def noting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self.app(scope, receive, noting)
        finally:
            route = getattr(scope.get("route"), "path", "none")  # a path as such could be anything, and each would be a series
            method = scope["method"] if scope["method"] in ("DELETE", "GET", "HEAD", "PATCH", "POST", "PUT") else "other"
            self._seconds.labels(method, route, str(status)).observe(time.perf_counter() - started)
