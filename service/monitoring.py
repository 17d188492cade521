"""What `/metrics` tells Prometheus: jobs as the database has them, and how long this API takes to answer."""

from __future__ import annotations

import os
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.registry import Collector
from sqlalchemy.orm import Session, sessionmaker
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.logs import set_request
from service.store.session import reading
from service.store.statistics import job_statistics, queues_in_use
from service.store.workers import GpuReading, WorkerState, list_workers

BUCKETS_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
GPU_METRICS: dict[str, tuple[str, Callable[[GpuReading], float | None]]] = {
    "cliprd_gpu_utilization_ratio": ("Fraction of the last moments in which the GPU computed.", lambda gpu: gpu.utilization),
    "cliprd_gpu_memory_used_bytes": ("Memory that is used, by the driver too.", lambda gpu: gpu.memory_used_bytes),
    "cliprd_gpu_memory_total_bytes": ("Memory there is.", lambda gpu: gpu.memory_total_bytes),
    "cliprd_gpu_temperature_celsius": ("Temperature of the GPU.", lambda gpu: gpu.temperature_celsius),
}
_JOB_PATH = re.compile(r"/jobs/([0-9a-z-]{8,64})(?:/|$)")


SHARED_FOLDER_VARIABLE = "PROMETHEUS_MULTIPROC_DIR"
"""prometheus_client's: where it is set, the processes of one API keep their measurements in files of this folder, for each to tell all."""


def make_registry(sessions: sessionmaker[Session]) -> CollectorRegistry:
    """What `/metrics` tells beside the measurements that are registered with it."""
    registry = CollectorRegistry()
    registry.register(JobCollector(sessions))
    registry.register(WorkerCollector(sessions))
    if SHARED_FOLDER_VARIABLE in os.environ:
        MultiProcessCollector(registry)  # type: ignore[no-untyped-call]  # it registers itself
    return registry


class DatabaseCollector(Collector):
    """Asks the database at every scrape, so that any API process tells the whole truth."""

    def __init__(self, sessions: sessionmaker[Session]) -> None:
        self._sessions = sessions

    def describe(self) -> list[GaugeMetricFamily]:
        """Nothing: else registering would ask the database."""
        return []


class JobCollector(DatabaseCollector):
    """Jobs, and how fast they run."""

    def collect(self) -> Iterator[Metric]:
        with reading(self._sessions) as session:
            found = job_statistics(session=session)
        jobs = GaugeMetricFamily("cliprd_jobs", "Jobs there are.", labels=["state", "queue"])
        attempts = GaugeMetricFamily("cliprd_attempts", "Attempts of the jobs there are.", labels=["queue"])
        ended = CounterMetricFamily("cliprd_ended_attempts", "Attempts that ended, by how they did.", labels=["queue", "outcome"])
        oldest = GaugeMetricFamily("cliprd_queue_age_seconds", "How long the longest queued job has waited.", labels=["queue"])
        expired = GaugeMetricFamily("cliprd_expired_leases", "Running jobs whose worker is overdue.", value=found.num_expired_leases)
        speed = GaugeMetricFamily("cliprd_samples_per_second", "Pairs a second of each running job.", labels=["job_id", "queue"])
        for (state, queue), count in found.num_jobs.items():
            jobs.add_metric([state, queue], count)
        for queue, totals in found.queues.items():
            attempts.add_metric([queue], totals.num_attempts)
            oldest.add_metric([queue], totals.oldest_seconds)
        for (queue, outcome), count in found.num_ended.items():
            ended.add_metric([queue, outcome], count)  # zero, too: an increase is seen of series that were there before
        for running in found.running:
            speed.add_metric([running.job_id, running.queue], running.samples_per_second)
        yield from (jobs, attempts, ended, oldest, expired, speed)


class WorkerCollector(DatabaseCollector):
    """Workers and their GPUs. Of several workers that see one GPU, the latest report counts."""

    def collect(self) -> Iterator[GaugeMetricFamily]:
        with reading(self._sessions) as session:
            workers = list_workers(session=session)
            queues = queues_in_use(session=session)
        family = GaugeMetricFamily("cliprd_workers", "Workers there are; one of several queues counts in each.", labels=["state", "queue"])
        states = Counter((worker.state, queue) for worker in workers for queue in worker.queues)
        for queue in sorted(queues.union(*(worker.queues for worker in workers))):
            for state in WorkerState:
                family.add_metric([state, queue], states[state, queue])  # zero, too: an alert needs a series to look at
        yield family
        present = sorted((worker for worker in workers if worker.state is not WorkerState.LOST), key=lambda worker: worker.heartbeat_at)
        gpus = {(worker.host, gpu.uuid): gpu for worker in present for gpu in worker.gpus}
        for name, (help_text, read) in GPU_METRICS.items():
            family = GaugeMetricFamily(name, help_text, labels=["host", "gpu", "name"])
            for (host, uuid), gpu in gpus.items():
                if (value := read(gpu)) is not None:
                    family.add_metric([host, uuid, gpu.name], value)
            yield family


class RequestMonitor:
    """Middleware: measures requests by their route, and tells the logs what they are about."""

    def __init__(self, app: ASGIApp, registry: CollectorRegistry) -> None:
        self.app = app
        self._seconds = Histogram(
            "cliprd_request_seconds",
            "Seconds from a request to the end of its answer.",
            labelnames=["method", "route", "status"],
            buckets=BUCKETS_SECONDS,
            registry=None if SHARED_FOLDER_VARIABLE in os.environ else registry,  # else each process would tell its own besides
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
