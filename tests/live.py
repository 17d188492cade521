"""What tests ask of a running service and of the processes of its jobs."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import psutil

from cliprd_core.run_dir import METRICS_FILE, MetricsRecord, read_records
from service.client import Client
from service.schemas import JobView
from service.store.states import JobState
from tests.tiny import tiny_spec

TIMEOUT_SECONDS = 240.0
SHORT_LEASES = {
    "CLIPRD_LEASE_SECONDS": "5",
    "CLIPRD_HEARTBEAT_SECONDS": "1",
    "CLIPRD_REAPER_SECONDS": "0.5",
    "CLIPRD_POLL_SECONDS": "0.2",
}
"""Settings of workers."""

Found = TypeVar("Found")


class Jobs:
    """Jobs of a service, as a user and an operator see them.

    Args:
        client: The service's.
        shards: Of 32 pairs.
        runs: The worker's run directories.
    """

    def __init__(self, client: Client, shards: str, runs: Path) -> None:
        self.client = client
        self.runs = runs
        self._shards = shards

    def submit(self, *, epochs: int, teacher_job: str | None = None, idempotency_key: str | None = None, **changes: Any) -> str:
        """A job of 4 steps an epoch, with a checkpoint every 20 steps."""
        training = {"epochs": epochs, "checkpoint_every_steps": 20, **changes.pop("training", {})}
        rarely = {"every_epochs": 1000}
        spec = tiny_spec(self._shards, training=training, evaluation=rarely, **changes).model_dump(mode="json")
        if teacher_job is not None:
            spec |= {"recipe": "clip_rd", "teacher": {"job": teacher_job}}
            del spec["objective"]
        return self.client.submit(spec, idempotency_key=idempotency_key).id

    def run_dir(self, job_id: str) -> Path:
        return self.runs / job_id

    def wait_for(self, job_id: str, *states: JobState) -> JobView:
        def look() -> JobView | None:
            job = self.client.job(job_id)
            assert not job.state.is_finished or job.state in states, (job.state, job.error)
            return job if job.state in states else None

        return eventually(look)

    def wait_for_checkpoint(self, job_id: str) -> None:
        """Until the service has heard that the job's training started, and the training has saved."""
        eventually(lambda: self.client.job(job_id).started_at)
        eventually(lambda: any((self.run_dir(job_id) / "checkpoints").glob("*/COMPLETE.json")) or None)

    def steps_of_attempt(self, run: Path, attempt: int) -> list[int]:
        return [record.step for record, _ in read_records(run / METRICS_FILE, MetricsRecord) if record.attempt == attempt]


def eventually(look: Callable[[], Found | None], timeout_seconds: float = TIMEOUT_SECONDS) -> Found:
    """What `look` finds, once it finds something."""
    deadline = time.monotonic() + timeout_seconds
    while (found := look()) is None:
        assert time.monotonic() < deadline, f"it did not happen in {timeout_seconds:.0f} s: {look}"
        time.sleep(0.05)
    return found


def processes_of(job_id: str) -> list[psutil.Process]:
    """Live processes of a job: its lease's guard, torchrun, trainer and data loaders have its id on their command line."""
    found = []
    for process in psutil.process_iter(["cmdline", "status"]):
        if process.info["status"] != psutil.STATUS_ZOMBIE and job_id in " ".join(process.info["cmdline"] or []):
            found.append(process)
    return found


def alive(processes: Sequence[psutil.Process]) -> list[psutil.Process]:
    """Those that have not ended."""
    found = []
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            if process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def assert_nothing_runs(job_id: str) -> None:
    """Of a job whose end, pause or handing back has been told: its training had ended by then, the lease's guard ends just after."""
    left = [process for process in processes_of(job_id) if not is_guard(process)]
    assert not left
    eventually(lambda: not processes_of(job_id) or None)


def is_guard(process: psutil.Process) -> bool:
    """Of those that `processes_of` found."""
    return "worker.lease_guard" in process.info["cmdline"]
