"""Processes that are killed: SIGKILL, as by the kernel when memory runs out."""

from __future__ import annotations

import os
import signal
import threading
import time

from tests.chaos.lab import Lab
from tests.chaos.scenario import scenario

NUM_KILLS = 5
NUM_JOBS = 2
SUBMISSION_SECONDS = 0.05
"""About as long as one takes."""


@scenario("api-killed", f"SIGKILL of the API, {NUM_KILLS} times, while a job trains and another is being submitted; started again at once")
def api_killed(lab: Lab) -> str:
    training = lab.train_to_checkpoint()
    submitting = threading.Thread(target=lab.train)
    for number in range(NUM_KILLS):
        if number == 1:
            submitting.start()
        time.sleep(lab.rng.random() * SUBMISSION_SECONDS)
        assert lab.stack.api.process is not None
        lab.stack.api.process.kill()
        lab.struck(training)
        lab.stack.api.process.wait()
        lab.stack.start_api()
    submitting.join()
    assert len(lab.jobs) == NUM_JOBS
    for job_id in lab.jobs:
        assert lab.finish(job_id).attempt == 1, "the API is no part of training"
    return "the submission was repeated until it was answered, and made one job"


@scenario("worker-parent-killed", "SIGKILL of a worker's parent process, which is not started again")
def worker_parent_killed(lab: Lab) -> None:
    job_id = lab.train_to_checkpoint()
    lab.holder(job_id).kill()
    lab.struck(job_id)
    assert lab.finish(job_id).attempt == 2


@scenario("worker-child-killed", "SIGKILL of the worker's child that runs the job")
def worker_child_killed(lab: Lab) -> None:
    job_id = lab.train_to_checkpoint()
    lab.holder(job_id).pool_child().kill()
    lab.struck(job_id)
    assert lab.finish(job_id).attempt == 2


@scenario("torchrun-killed", "SIGKILL of torchrun, two training processes", num_processes=2)
def torchrun_killed(lab: Lab) -> None:
    job_id = lab.train_to_checkpoint()
    os.kill(lab.launcher(job_id).pid, signal.SIGKILL)
    lab.struck(job_id)
    assert lab.finish(job_id).attempt == 2


@scenario("rank-killed", "SIGKILL of the second of two training processes", num_processes=2)
def rank_killed(lab: Lab) -> None:
    job_id = lab.train_to_checkpoint()
    os.kill(lab.ranks(job_id)[-1].pid, signal.SIGKILL)
    lab.struck(job_id)
    assert lab.finish(job_id).attempt == 2
