"""Small specs and records, and short ways through a job's life, for tests of the store and of the API."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from sqlalchemy.orm import Session, sessionmaker

from cliprd_core.run_dir import ErrorReason, ErrorRecord, EvaluationRecord, MetricsRecord, Progress, ResultRecord
from cliprd_core.spec import JobSpec
from service.queue import JobQueue
from service.store import jobs
from service.store.models import Job
from service.store.session import reading
from service.store.workers import GpuReading, report_worker

Sessions = sessionmaker[Session]

TINY_CONFIG: dict[str, Any] = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 32},
    "text_cfg": {"width": 16, "layers": 1},
}

CONFIG_KEYS: dict[str, list[str]] = {
    tower: list(keys) for tower, keys in json.loads(files("cliprd_core").joinpath("known_config_keys.json").read_text()).items()
}
"""Of each tower of a model config, the keys that open_clip knows."""

ODD_VALUES: list[Any] = [
    *([], [1], [1, 2], [1, 2, 3], [1, 1, 1, 1], [0, 0], ["a", "b"], [None, None], [[1], [2]]),
    *(0, 1, -1, 2**70, 0.5, -0.5, 1e308, "", "x", None, True, False, {}, {"a": 1}),
]
"""For keys of a model config: of every kind, and of sizes that nobody means."""

SUCCESS = ResultRecord(
    step=20,
    samples_seen=80,
    num_student_parameters=1000,
    num_teacher_parameters=None,
    num_corrupt_samples=0,
    train_seconds=1.5,
    export_files=["open_clip_config.json"],
)
FAILURE = ErrorRecord(reason=ErrorReason.DIVERGED, message="The loss became NaN at step 7.", advice="Lower the learning rate.")


def local_client(app: FastAPI, **options: Any) -> TestClient:
    """A client on this machine, which is let in without an API key."""
    return TestClient(app, base_url="http://127.0.0.1", client=("127.0.0.1", 50_000), **options)


def submit(client: TestClient, **changes: Any) -> dict[str, Any]:
    """A job that was submitted as `spec_dict`, as the API answers it."""
    response = client.post("/jobs", json=spec_dict(**changes))
    assert response.status_code == 201, response.text
    job: dict[str, Any] = response.json()
    return job


def spec_dict(**changes: Any) -> dict[str, Any]:
    """A spec whose data is the table `pairs.tsv`; `changes` replace whole fields."""
    return {
        "name": "test",
        "recipe": "clip",
        "student": {"config": TINY_CONFIG},
        "data": {"train": [{"type": "csv", "path": "pairs.tsv"}]},
        "training": {"global_batch_size": 2, "warmup_steps": 1},
        **changes,
    }


def write_table(folder: Path, num_pairs: int = 4) -> None:
    """The table that `spec_dict` names."""
    rows = "".join(f"{index}.png\ta picture\n" for index in range(num_pairs))
    (folder / "pairs.tsv").write_text(f"filepath\ttitle\n{rows}")


def write_tar(path: Path, num_pairs: int) -> None:
    """A shard of pairs without content."""
    with tarfile.open(path, "w") as shard:
        for index in range(num_pairs):
            for suffix in ("png", "txt"):
                shard.addfile(tarfile.TarInfo(f"{index}.{suffix}"))


def distilled_spec(*teacher_job_ids: str) -> JobSpec:
    """A spec whose teacher is another job's result, or whose teachers are several jobs'."""
    teachers = [{"job": job_id} for job_id in teacher_job_ids]
    named = {"teacher": teachers[0]} if len(teachers) == 1 else {"teachers": teachers}
    return JobSpec.model_validate(spec_dict(recipe="clip_kd", **named))


def create(sessions: Sessions, spec: JobSpec | None = None, **options: Any) -> Job:
    """A stored job."""
    with sessions.begin() as session:
        return jobs.create_job(session=session, spec=spec or JobSpec.model_validate(spec_dict()), **options)


def claim(sessions: Sessions, job_id: str, worker: str = "worker-1", lease_seconds: float = 60) -> jobs.Claim:
    """The claim of a queued job."""
    with sessions.begin() as session:
        claimed = jobs.claim_job(session=session, job_id=job_id, worker=worker, lease_seconds=lease_seconds)
    assert claimed is not None
    return claimed


def gpu() -> GpuReading:
    """A GPU that is half busy."""
    return GpuReading(0, "GPU-0", "NVIDIA H100", 0.5, 10_000_000_000, 80_000_000_000, 50.0)


def report(
    sessions: Sessions,
    worker_id: str,
    *,
    host: str = "machine",
    queues: Sequence[str] = ("default",),
    problems: Sequence[str] = (),
    gpus: Sequence[GpuReading] = (),
) -> None:
    """A worker's heartbeat."""
    with sessions.begin() as session:
        report_worker(session=session, worker_id=worker_id, host=host, queues=queues, problems=problems, gpus=gpus, valid_seconds=60)


def sent_jobs(monkeypatch: pytest.MonkeyPatch) -> list[jobs.QueuedJob]:
    """What the API sends from now on, in place of sending it."""
    sent: list[jobs.QueuedJob] = []

    def send(_: JobQueue, queued: Sequence[jobs.QueuedJob]) -> bool:
        sent.extend(queued)
        return True

    monkeypatch.setattr(JobQueue, "send", send)
    return sent


def finish(sessions: Sessions, claimed: jobs.Claim, outcome: jobs.Outcome = SUCCESS) -> list[jobs.QueuedJob]:
    """Finish a claimed job."""
    with sessions.begin() as session:
        return jobs.finish_job(session=session, job_id=claimed.job.id, lease_token=claimed.lease_token, outcome=outcome)


def read(sessions: Sessions, job_id: str) -> Job:
    """The job as it is now."""
    with reading(sessions) as session:
        return jobs.get_job(session=session, job_id=job_id)


def progress_at(step: int) -> Progress:
    """Progress of a run of 20 steps of 4 pairs."""
    return Progress(step=step, num_steps=20, epoch=step / 10, samples_seen=4 * step, samples_per_second=8.0, eta_seconds=(20 - step) / 2)


def measured(step: int, attempt: int = 1, **values: float) -> MetricsRecord:
    """A metrics record; `train_loss` stands for `train/loss`."""
    named = {name.replace("_", "/", 1): value for name, value in values.items()}
    return MetricsRecord(attempt=attempt, step=step, time=1.0, progress=progress_at(step), values=named)


def evaluated(step: int, attempt: int = 1, top1: float = 0.5) -> EvaluationRecord:
    """A zero-shot evaluation."""
    return EvaluationRecord(
        attempt=attempt,
        step=step,
        epoch=step / 10,
        time=1.0,
        task="zero_shot",
        dataset="emoji",
        num_samples=10,
        metrics={"zero_shot_top1": top1},
        chance={"zero_shot_top1": 0.1},
    )
