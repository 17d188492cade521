"""Processes that are killed: SIGKILL, as by the kernel when memory runs out."""

from __future__ import annotations

import os
import signal

from tests.chaos.lab import Lab
from tests.chaos.scenario import scenario


@scenario("api-killed", "SIGKILL of the API while a job trains; started again at once")
def api_killed(lab: Lab) -> None:
    job_id = lab.train_to_checkpoint()
    assert lab.stack.api.process is not None
    lab.stack.api.process.kill()
    lab.struck(job_id)
    lab.stack.api.process.wait()
    lab.stack.start_api()
    assert lab.finish(job_id).attempt == 1, "the API is no part of training"


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
