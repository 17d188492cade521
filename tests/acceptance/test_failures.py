"""Workers that die or are told to stop in the middle of a job: nothing is orphaned, and the job goes on where it was."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import psutil
import pytest

from service.store.kinds import ArtifactKind
from service.store.states import JobState
from tests.acceptance.conftest import Service
from tests.live import TIMEOUT_SECONDS, alive, assert_nothing_runs, eventually, is_guard, processes_of


@pytest.mark.parametrize("victim", ["pool child", "parent"])
def test_a_killed_worker_orphans_nothing_and_the_job_resumes(service: Service, victim: str) -> None:
    job_id = service.submit(epochs=100, training={"num_data_workers": 1})
    service.wait_for_checkpoint(job_id)
    worker = service.stack.children["worker"].process
    assert worker is not None
    (child,) = psutil.Process(worker.pid).children()
    run = [process for process in processes_of(job_id) if not is_guard(process)]
    assert run
    if victim == "parent":
        worker.kill()
        worker.wait()
    else:
        child.kill()

    def is_gone() -> bool | None:
        attempt = service.client.job(job_id).attempt  # asked first, so what is left after that trained on while it was this one
        left = alive(run)
        assert not left or attempt == 1, "gone before anyone else could have the job"
        return not left or None

    eventually(is_gone)
    service.stack.watch(print)  # starts the worker again if that was the victim
    job = service.wait_for(job_id, JobState.SUCCEEDED)
    assert job.attempt == 2
    run = service.run_dir(job_id)
    resumed_at = service.steps_of_attempt(run, 2)[0]
    assert 1 < resumed_at <= service.steps_of_attempt(run, 1)[-1] + 1, "from the newest checkpoint"
    assert service.client.metrics(job_id, ["train/loss"])["train/loss"].steps[-1] == 400
    assert_nothing_runs(job_id)


def test_a_killed_training_process_is_started_again_from_its_checkpoint(service: Service) -> None:
    job_id = service.submit(epochs=100)
    service.wait_for_checkpoint(job_id)
    launchers = (process for process in processes_of(job_id) if "cliprd_core.torchrun" in process.cmdline())
    torchrun = min(launchers, key=lambda process: process.create_time())
    (trainer,) = torchrun.children()
    trainer.kill()
    job = service.wait_for(job_id, JobState.SUCCEEDED)
    assert job.attempt == 2
    assert service.steps_of_attempt(service.run_dir(job_id), 2)[0] > 1, "from the newest checkpoint"
    assert_nothing_runs(job_id)


def test_a_stopped_worker_hands_its_job_to_one_on_another_machine(service: Service, tmp_path: Path) -> None:
    job_id = service.submit(epochs=100)
    service.wait_for_checkpoint(job_id)
    worker = service.stack.children["worker"]
    assert worker.process is not None
    os.kill(worker.process.pid, signal.SIGTERM)
    assert worker.process.wait(TIMEOUT_SECONDS) == 0
    job = service.client.job(job_id)
    assert (job.state, job.attempt) == (JobState.QUEUED, 1)
    assert_nothing_runs(job_id)
    stopped_at = service.steps_of_attempt(service.run_dir(job_id), 1)[-1]
    mirrored = {artifact.step for artifact in service.client.artifacts(job_id, ArtifactKind.CHECKPOINT)}
    assert stopped_at in mirrored
    assert len(mirrored) <= 2

    here = worker.environment["CLIPRD_RUNS_ROOT"]
    worker.environment["CLIPRD_RUNS_ROOT"] = str(tmp_path / "runs")  # shares nothing but database, broker and store
    try:
        worker.start()
        job = service.wait_for(job_id, JobState.SUCCEEDED)
        assert job.attempt == 2
        assert service.steps_of_attempt(tmp_path / "runs" / job_id, 2) == list(range(stopped_at + 1, 401))
    finally:
        worker.stop()
        worker.environment["CLIPRD_RUNS_ROOT"] = here
        worker.start()
