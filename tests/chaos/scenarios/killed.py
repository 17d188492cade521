"""Processes that are killed: SIGKILL, as by the kernel when memory runs out."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import LiteralString

import psycopg
from sqlalchemy.engine import make_url

from tests.chaos.lab import EPOCHS, STEPS_PER_EPOCH, Lab
from tests.chaos.paced_trainer import HELD_STEP_VARIABLE
from tests.chaos.scenario import scenario
from tests.live import eventually

NUM_KILLS = 5
SUBMISSION_SECONDS = 0.05
"""About as long as one takes."""
HELD = {HELD_STEP_VARIABLE: str(EPOCHS * STEPS_PER_EPOCH - 10)}
"""For a run whose first attempt is to be killed."""


@scenario(
    "api-killed",
    f"SIGKILL of the API, {NUM_KILLS} times, while a job trains; the first hits a submission before its commit",
)
def api_killed(lab: Lab) -> str:
    training = lab.train_to_checkpoint()
    kill_in_submission(lab)
    for _ in range(NUM_KILLS - 1):
        time.sleep(lab.rng.random() * SUBMISSION_SECONDS)
        kill_api(lab)
        lab.struck(training)
        lab.stack.start_api()
    for job_id in lab.jobs:
        assert lab.finish(job_id).attempt == 1, "the API is no part of training"
    return "the submission was repeated until it was answered, and made one job"


def kill_api(lab: Lab) -> None:
    assert lab.stack.api.process is not None
    lab.stack.api.process.kill()
    lab.stack.api.process.wait()


def kill_in_submission(lab: Lab) -> None:
    """Kill the API while a submission is held up before its commit; then let it be answered."""
    submitting = threading.Thread(target=lab.train)
    num_jobs = len(lab.jobs)
    with before_commit(lab) as is_there:
        submitting.start()
        eventually(lambda: is_there() or None)
        assert len(lab.jobs) == num_jobs, "it was answered"
        kill_api(lab)
    lab.stack.start_api()
    submitting.join()
    assert len(lab.jobs) == num_jobs + 1


@contextmanager
def before_commit(lab: Lab) -> Iterator[Callable[[], bool]]:
    """A submission's transaction waits to write its key, which it does last; whether one does is asked of what this gives."""
    with psycopg.connect(plain_url(lab)) as holder, psycopg.connect(plain_url(lab), autocommit=True) as looker:
        holder.execute("LOCK TABLE idempotency_keys IN SHARE MODE")
        waiting = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND query LIKE 'INSERT INTO idempotency_keys%'"
        yield lambda: counted(looker, waiting) > 0


def plain_url(lab: Lab) -> str:
    """The database's, past its proxy, as libpq takes it."""
    return make_url(lab.stack.database_url).set(drivername="postgresql").render_as_string(hide_password=False)


def counted(connection: psycopg.Connection, query: LiteralString) -> int:
    row = connection.execute(query).fetchone()
    assert row is not None
    return int(row[0])


@scenario("worker-parent-killed", "SIGKILL of a worker's parent process, which is not started again", settings=HELD)
def worker_parent_killed(lab: Lab) -> None:
    job_id = lab.train_to_checkpoint()
    lab.holder(job_id).kill()
    lab.struck(job_id)
    assert lab.finish(job_id).attempt == 2


@scenario("worker-child-killed", "SIGKILL of the worker's child that runs the job", settings=HELD)
def worker_child_killed(lab: Lab) -> None:
    job_id = lab.train_to_checkpoint()
    lab.holder(job_id).pool_child().kill()
    lab.struck(job_id)
    assert lab.finish(job_id).attempt == 2


@scenario("torchrun-killed", "SIGKILL of torchrun, two training processes", settings=HELD, num_processes=2)
def torchrun_killed(lab: Lab) -> None:
    job_id = lab.train_to_checkpoint()
    os.kill(lab.launcher(job_id).pid, signal.SIGKILL)
    lab.struck(job_id)
    assert lab.finish(job_id).attempt == 2


@scenario("rank-killed", "SIGKILL of the second of two training processes", settings=HELD, num_processes=2)
def rank_killed(lab: Lab) -> None:
    job_id = lab.train_to_checkpoint()
    os.kill(lab.ranks(job_id)[-1].pid, signal.SIGKILL)
    lab.struck(job_id)
    assert lab.finish(job_id).attempt == 2
