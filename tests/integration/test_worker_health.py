"""What real worker processes over a real Redis say about themselves, as a container's probe hears it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest

from cliprd_core.spec import JobSpec
from service.queue import JobQueue
from service.store.control import request_cancel
from service.store.session import make_engine, make_sessions, migrate, reading
from service.store.states import JobState
from service.store.transitions import QueuedJob
from service.store.workers import WorkerState, WorkerStatus, list_workers
from tests.dripping_receiver import dripping
from tests.live import SHORT_LEASES
from tests.redis_server import RedisServer
from tests.store_helpers import Sessions, create, read, spec_dict
from worker.health import HEALTH_FILE_VARIABLE

ROOT = Path(__file__).parents[2]
TIMEOUT_SECONDS = 120.0
HEALTH_SECONDS = 0.3
SILENCE_SECONDS = 5.0  # of tests/watched_worker.py


class Machine:
    """One worker with its own database and broker."""

    def __init__(self, folder: Path, redis: RedisServer, database_url: str, **variables: str) -> None:
        self.redis = redis
        migrate(database_url)
        self.engine = make_engine(database_url)
        self.sessions: Sessions = make_sessions(self.engine)
        self.queue = JobQueue(redis.url, timeout_seconds=TIMEOUT_SECONDS)
        self.environment = os.environ | {
            HEALTH_FILE_VARIABLE: str(folder / "health.json"),
            "CLIPRD_HEALTH_SECONDS": str(HEALTH_SECONDS),
            "CLIPRD_DATABASE_URL": database_url,
            "CLIPRD_BROKER_URL": redis.url,
            "CLIPRD_QUEUES": "default,h100",
            "CLIPRD_ARTIFACTS_ROOT": str(folder / "artifacts"),
            "CLIPRD_RUNS_ROOT": str(folder / "runs"),
            "CLIPRD_TRAINER": str(ROOT / "tests" / "fake_trainer.py"),
            "PYTHONPATH": str(ROOT),
            **variables,
        }
        self.log = folder / "worker.log"
        command = [sys.executable, "-m", "celery", "-A", "tests.watched_worker", "worker", "--without-gossip", "--without-mingle"]
        with self.log.open("wb") as log:
            self.worker = subprocess.Popen(command, env=self.environment, cwd=folder, stdout=log, stderr=subprocess.STDOUT)

    def probe(self, *arguments: str) -> tuple[int, str]:
        """Exit code and line of a container's probe."""
        command = [sys.executable, "-m", "worker.health", *arguments]
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, check=False, cwd=ROOT)
        assert done.stderr == ""
        (line,) = done.stdout.splitlines()
        return done.returncode, line

    def wait_until(self, says: str) -> None:
        """Wait until the probe's line has something that `says` matches: ready, or not ready because of it."""
        deadline = time.monotonic() + TIMEOUT_SECONDS
        while True:
            code, line = self.probe()
            assert (code == 0) == (line == "ready")
            if re.search(says, line):
                return
            assert time.monotonic() < deadline, (line, self.log.read_text())
            time.sleep(0.1)

    def workers(self) -> list[WorkerStatus]:
        with reading(self.sessions) as session:
            return list_workers(session=session)

    def wait_for_worker(self, state: WorkerState) -> None:
        deadline = time.monotonic() + TIMEOUT_SECONDS
        while [worker.state for worker in self.workers()] != [state]:
            assert time.monotonic() < deadline, self.workers()
            time.sleep(0.1)

    def submit(self, **labels: str) -> str:
        job_id = create(self.sessions, JobSpec.model_validate(spec_dict(labels=labels))).id
        assert self.queue.send([QueuedJob(job_id, "default")])
        return job_id

    def wait_for(self, job_id: str, state: JobState) -> None:
        deadline = time.monotonic() + TIMEOUT_SECONDS
        while read(self.sessions, job_id).state is not state:
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.1)

    def close(self) -> None:
        children = psutil.Process(self.worker.pid).children(recursive=True) if self.worker.poll() is None else []
        self.worker.kill()
        self.worker.wait()
        for child in children:  # not the trainer, which dies with its parent
            with suppress(psutil.NoSuchProcess):
                child.kill()
        psutil.wait_procs(children, timeout=10)
        self.queue.close()
        self.engine.dispose()


@contextmanager
def ready_machine(folder: Path, database_url: str = "", **variables: str) -> Iterator[Machine]:
    """A worker that is ready, on a SQLite of its own where no other database is named."""
    with RedisServer() as redis:
        machine = Machine(folder, redis, database_url or f"sqlite:///{folder / 'cliprd.db'}", **variables)
        try:
            machine.wait_until("^ready$")
            yield machine
        finally:
            machine.close()


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Machine]:
    with ready_machine(tmp_path) as machine:
        yield machine


def test_it_is_ready_only_while_the_broker_is_there(machine: Machine) -> None:
    machine.redis.stop()
    machine.wait_until("not connected to the broker; broker: ")
    assert machine.probe("--live") == (0, "live"), "a restart would not help"
    machine.redis.start()
    machine.wait_until("^ready$")
    machine.wait_for(machine.submit(), JobState.SUCCEEDED)


def test_a_worker_whose_acknowledgement_was_lost_takes_the_next_job(tmp_path: Path) -> None:
    with ready_machine(tmp_path, CLIPRD_TEST_LOST_ACKS="1") as machine:
        for _ in range(2):
            machine.wait_for(machine.submit(), JobState.SUCCEEDED)
        machine.wait_until("^ready$")
        assert "Couldn't ack" in machine.log.read_text()


def test_a_busy_worker_is_ready_as_long_as_the_broker_is_there(machine: Machine) -> None:
    job_id = machine.submit(steps="10000", step_seconds="0.05")
    machine.wait_for(job_id, JobState.RUNNING)
    machine.wait_for_worker(WorkerState.CONSUMING)
    (worker,) = machine.workers()
    assert (worker.job_id, worker.queues) == (job_id, ["default", "h100"])
    until = time.monotonic() + 1.5 * SILENCE_SECONDS
    while time.monotonic() < until:
        line = machine.probe()[1]
        assert not re.search("does not take jobs(?!: its event loop has not run)", line), line  # it asks the broker for nothing
    machine.wait_until("^ready$")  # a machine that stood still for seconds makes any worker late
    assert read(machine.sessions, job_id).state is JobState.RUNNING
    machine.redis.stop()
    machine.wait_until("broker: ")
    machine.redis.start()
    machine.wait_until("^ready$")
    with machine.sessions.begin() as session:
        request_cancel(session=session, job_id=job_id)
    machine.wait_for(job_id, JobState.CANCELLED)
    machine.wait_for(machine.submit(), JobState.SUCCEEDED)
    machine.wait_until("^ready$")


def test_a_cancelled_consumer_is_not_ready(machine: Machine) -> None:
    machine.worker.send_signal(signal.SIGUSR1)
    machine.wait_until("it does not consume default, h100")


def test_a_consumer_that_asks_for_nothing_is_not_ready(machine: Machine) -> None:
    machine.worker.send_signal(signal.SIGUSR2)
    machine.wait_until("it has had no answer from the broker for [0-9]+ s$")
    assert "h100" not in machine.probe()[1], "all that Celery knows says that it consumes"


def test_a_stopped_worker_is_not_ready_until_it_goes_on(tmp_path: Path, postgres_url: str) -> None:
    # PostgreSQL, as a worker that is stopped just as it closes a SQLite keeps all others from it, readers, too.
    with ready_machine(tmp_path, postgres_url) as machine:
        machine.worker.send_signal(signal.SIGSTOP)
        machine.wait_until("has not reported for [0-9]+ s")
        machine.wait_for_worker(WorkerState.LOST)  # its row may be younger than its file
        machine.worker.send_signal(signal.SIGCONT)
        machine.wait_until("^ready$")
        machine.wait_for_worker(WorkerState.CONSUMING)  # or older, if it was stopped between the two
        machine.worker.terminate()
        assert machine.worker.wait(TIMEOUT_SECONDS) == 0
        code, line = machine.probe()
        assert code == 1
        assert "none runs here" in line
        assert machine.workers() == []


def test_a_killed_worker_is_not_ready(machine: Machine) -> None:
    machine.worker.kill()
    machine.wait_until("has not reported for [0-9]+ s")


def test_a_worker_whose_child_hangs_is_not_ready(tmp_path: Path, postgres_url: str) -> None:
    # PostgreSQL ends the transaction of a client that is frozen in its midst; SQLite would stay locked until the child goes on.
    with ready_machine(tmp_path, postgres_url, **SHORT_LEASES) as machine:
        job_id = machine.submit(steps="10000", step_seconds="0.05")
        machine.wait_for(job_id, JobState.RUNNING)
        (child,) = psutil.Process(machine.worker.pid).children()
        child.suspend()
        machine.wait_for(job_id, JobState.QUEUED)
        machine.wait_until("its child process hangs")
        machine.wait_for_worker(WorkerState.NOT_CONSUMING)
        child.resume()
        machine.wait_until("^ready$")
        machine.wait_for_worker(WorkerState.CONSUMING)


def test_the_job_of_a_killed_child_does_not_wait_for_its_lease(tmp_path: Path) -> None:
    with ready_machine(tmp_path, CLIPRD_LEASE_SECONDS="600", CLIPRD_REAPER_SECONDS="0.2") as machine:
        job_id = machine.submit(steps="10000", step_seconds="0.05")
        machine.wait_for(job_id, JobState.RUNNING)
        (child,) = psutil.Process(machine.worker.pid).children()
        child.kill()
        deadline = time.monotonic() + TIMEOUT_SECONDS
        while (job := read(machine.sessions, job_id)).attempt < 2:  # the new child takes it
            assert time.monotonic() < deadline, machine.log.read_text()
            time.sleep(0.1)
        assert job.worker == machine.workers()[0].id


def test_a_receiver_of_webhooks_that_drips_bytes_does_not_keep_a_killed_child_from_being_replaced(tmp_path: Path) -> None:
    with dripping(b"HTTP/1.1 200 OK\r\nx-") as receiver:
        variables = {
            "CLIPRD_WEBHOOK_URLS": receiver.url,
            "CLIPRD_WEBHOOK_SECRET": "whsec_" + "c2VjcmV0" * 4,
            "CLIPRD_REAPER_SECONDS": "0.2",
        }
        with ready_machine(tmp_path, **variables) as machine:
            machine.wait_for(machine.submit(), JobState.SUCCEEDED)
            assert receiver.is_waited_for.wait(TIMEOUT_SECONDS)
            (child,) = psutil.Process(machine.worker.pid).children()
            child.kill()
            machine.wait_for(machine.submit(), JobState.SUCCEEDED)
            machine.wait_until("^ready$")
