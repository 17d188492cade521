"""What a scenario works with: a running stack, its jobs, those who watch them, and the undisturbed runs to compare with."""

from __future__ import annotations

import random
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from cliprd_core.run_dir import METRICS_FILE, MetricsRecord, read_records
from service.client import Client, CliprdError
from service.schemas import JobView
from service.store.states import JobState
from tests.chaos.stack import Stack, Worker
from tests.chaos.trainers import Marked, TrainerWatch
from tests.chaos.witness import Witness
from tests.live import Jobs, eventually
from tests.postgres_server import PostgresServer

EPOCHS = 25
STEPS_PER_EPOCH = 4
FIRST_CHECKPOINT = 20
FINISH_SECONDS = 300.0
MAX_ERROR_CHARACTERS = 300


class SkippedError(Exception):
    """The scenario cannot be played on this machine; the message says why and what it lacks."""


@dataclass(frozen=True)
class Reference:
    """What an undisturbed run made."""

    weights_sha256: str
    losses: dict[int, float]
    """By step."""


class Strike(NamedTuple):
    """When a fault hit a job."""

    job_id: str
    attempt: int
    at: float
    """Of the monotonic clock."""
    step: int
    """The last one that had been trained."""


class Outage:
    """Begins when it is made.

    Args:
        seconds: How long it is to last.
    """

    def __init__(self, seconds: float) -> None:
        self._began_at = time.monotonic()
        self._seconds = seconds

    @property
    def seconds_so_far(self) -> float:
        return time.monotonic() - self._began_at

    def wait(self) -> None:
        """Until it has lasted long enough."""
        time.sleep(max(0.0, self._seconds - self.seconds_so_far))


@dataclass
class Bench:
    """What all scenarios of one call share."""

    postgres: PostgresServer
    folder: Path
    shards: str
    outage_seconds: float
    seed: int
    references: dict[int, Reference] = field(default_factory=dict)
    """By number of training processes."""
    num_steps: int = EPOCHS * STEPS_PER_EPOCH
    """Of each job."""
    settings: Mapping[str, str] = field(default_factory=dict)
    """`CLIPRD_…` of all stacks, where a scenario has none of its own."""
    stray_seconds: float = 10.0
    """What is left so long after the jobs' end is an orphan."""


class Lab(Jobs):
    """One scenario's stack and jobs."""

    def __init__(
        self,
        bench: Bench,
        stack: Stack,
        client: Client,
        *,
        num_processes: int,
        watch: TrainerWatch,
        witness: Witness,
        rng: random.Random,
        around: Any,
    ) -> None:
        super().__init__(client, bench.shards, stack.workers[0].runs)
        self.bench = bench
        self.stack = stack
        self.watch = watch
        self.witness = witness
        self.rng = rng
        self.jobs: list[str] = []
        """Ids of the jobs that the API has acknowledged."""
        self.num_processes = num_processes
        self.around = around
        """What the scenario's `around` gives."""
        self._struck: Strike | None = None

    @property
    def workers(self) -> list[Worker]:
        return self.stack.workers

    def train(self) -> str:
        """Submit the job that the undisturbed runs were of."""
        key = str(uuid.uuid4())  # an answer that gets lost on its way must not make two jobs

        def submit() -> str | None:
            try:
                return self.submit(epochs=EPOCHS, idempotency_key=key, resources={"num_processes": self.num_processes})
            except CliprdError as error:
                if error.problem is not None and error.problem.status < 500:
                    raise
                return None

        job_id = eventually(submit)
        self.jobs.append(job_id)
        self.witness.follow(job_id)
        return job_id

    def train_to_checkpoint(self) -> str:
        """A job that has saved its first checkpoint and trains on, up to a second from then."""
        job_id = self.train()
        self.wait_for_step(job_id, FIRST_CHECKPOINT + 1)
        time.sleep(self.rng.random())  # so that the fault hits another moment each time
        return job_id

    def wait_for_step(self, job_id: str, step: int) -> None:
        """Until the API tells of this step."""
        eventually(lambda: self.witness.told[job_id].step >= step or None)

    def struck(self, job_id: str) -> None:
        """The fault has just happened, or ended if it lasts: the time of recovery is from now until the API tells of a step that was not
        trained before."""
        attempt = max((sight.attempt for sight in self.witness.told[job_id].sights), default=0)
        at, trained = time.monotonic(), (record.step for record in self.records(job_id))
        self._struck = Strike(job_id, attempt, at, max(trained, default=0))

    def recovery_seconds(self) -> float | None:
        if self._struck is None:
            return None
        job_id, attempt, at, trained = self._struck
        records = self.records(job_id)
        if any(record.attempt > attempt for record in records):  # the one that ended may have trained on while its processes died
            trained = max((record.step for record in records if record.attempt <= attempt), default=0)
        recovered_at = self.witness.told[job_id].first_beyond(trained, at)
        return None if recovered_at is None else recovered_at - at

    def see(self, job_id: str) -> JobView | None:
        """The job as it is, or None while the API does not answer."""
        try:
            return self.client.job(job_id)
        except CliprdError:
            return None

    def finish(self, job_id: str) -> JobView:
        """Wait until the job has succeeded."""

        def look() -> JobView | None:
            job = self.see(job_id)
            assert job is None or not job.state.is_finished or job.state is JobState.SUCCEEDED, f"it {job.state}: {job.error}"[
                :MAX_ERROR_CHARACTERS
            ]
            return job if job is not None and job.state.is_finished else None

        return eventually(look, FINISH_SECONDS)

    def wait_for_attempt(self, job_id: str, attempt: int) -> None:
        """Until the API tells of it."""
        eventually(lambda: any(sight.attempt >= attempt for sight in self.witness.told[job_id].sights) or None)

    def wait_for_training(self, job_id: str, *, attempt: int) -> None:
        """Until the attempt has trained a step, whether told or not."""
        eventually(lambda: any(record.attempt == attempt for record in self.records(job_id)) or None)

    def holder(self, job_id: str) -> Worker:
        """The worker that runs the job."""
        pid = int((self.client.job(job_id).worker or "").split(":")[1])
        return next(worker for worker in self.workers if worker.holds(pid))

    def other(self, worker: Worker) -> Worker:
        return next(one for one in self.workers if one is not worker)

    def ranks(self, job_id: str) -> list[Marked]:
        """The job's training processes, in order of their start."""
        cookies = self.watch.cookies[job_id]
        found = [one for one in self.stack.census() if one.cookie in cookies and one.is_rank and "spec.json" in one.command]
        return sorted(found, key=lambda one: one.pid)

    def launcher(self, job_id: str) -> Marked:
        """torchrun."""
        cookies = self.watch.cookies[job_id]
        launchers = (one for one in self.stack.census() if one.cookie in cookies and not one.is_rank)
        return next(one for one in launchers if "cliprd_core.torchrun" in one.command)

    def runs_of(self, job_id: str) -> list[Path]:
        """The job's run directories, wherever it ran."""
        roots = dict.fromkeys(worker.runs for worker in self.workers)
        return [root / job_id for root in roots if (root / job_id).exists()]

    def records(self, job_id: str) -> list[MetricsRecord]:
        """Everything its trainers wrote down, attempt by attempt. The time in them is of a clock that may have been set."""
        found = [record for run in self.runs_of(job_id) for record, _ in read_records(run / METRICS_FILE, MetricsRecord)]
        return sorted(found, key=lambda record: record.attempt)

    @contextmanager
    def outage(self, job_id: str, seconds: float | None = None) -> Iterator[Outage]:
        """Something is away within the block, for as long as outages are to last or as given; the job's recovery counts from its end."""
        yield Outage(self.bench.outage_seconds if seconds is None else seconds)
        self.struck(job_id)
