"""Whole jobs through REST, broker, worker, torchrun and trainer, with real processes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from celery import Celery

from cliprd_core.run_dir import ErrorReason
from service.store.kinds import ArtifactKind
from service.store.states import JobState
from tests.acceptance.conftest import Service
from tests.live import assert_nothing_runs, eventually, processes_of
from tests.tiny import tiny_config

LOAD_WITH_OPEN_CLIP = """
import json, sys
import open_clip, torch
name = "local-dir:" + sys.argv[1]
model, _, preprocess = open_clip.create_model_and_transforms(name)
tokens = open_clip.get_tokenizer(name)(["a red circle", "a blue square"])
features = model.eval().encode_text(tokens, normalize=True)
print(json.dumps({"shape": list(features.shape), "foreign": [m for m in sys.modules if m.startswith(("cliprd", "service", "worker"))]}))
"""


def test_from_a_spec_to_a_model_in_open_clip(service: Service, tmp_path: Path) -> None:
    job_id = service.submit(epochs=2)
    job = service.wait_for(job_id, JobState.SUCCEEDED)
    assert (job.attempt, job.result.step if job.result else None) == (1, 8)
    assert job.progress is not None
    assert job.progress.step == job.progress.num_steps == 8
    assert service.client.metrics(job_id, ["train/loss"])["train/loss"].steps == list(range(1, 9))
    files = service.client.download_model(job_id, tmp_path / "student")
    assert {file.name for file in files} >= {"open_clip_config.json", "open_clip_model.safetensors"}
    command = [sys.executable, "-W", "ignore", "-c", LOAD_WITH_OPEN_CLIP, str(tmp_path / "student")]
    loaded = json.loads(subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path).stdout)
    assert loaded == {"shape": [2, 32], "foreign": []}
    assert_nothing_runs(job_id)


def test_cancelling_a_running_job_leaves_no_process(service: Service) -> None:
    job_id = service.submit(epochs=10_000, resources={"num_processes": 2}, training={"num_data_workers": 1})
    service.wait_for_checkpoint(job_id)
    assert len(processes_of(job_id)) >= 4, "the guard, torchrun and two trainers"
    service.client.cancel(job_id)
    job = service.wait_for(job_id, JobState.CANCELLED)
    assert job.error is None
    assert_nothing_runs(job_id)
    assert not service.client.artifacts(job_id, ArtifactKind.MODEL)


def test_a_paused_job_frees_its_worker_and_the_same_run_goes_on(service: Service) -> None:
    job_id = service.submit(epochs=100)
    service.wait_for_checkpoint(job_id)
    service.client.pause(job_id)
    service.wait_for(job_id, JobState.PAUSED)
    assert_nothing_runs(job_id)
    other_id = service.submit(epochs=1)
    service.wait_for(other_id, JobState.SUCCEEDED)
    service.client.resume(job_id)
    job = service.wait_for(job_id, JobState.SUCCEEDED)
    assert (job.attempt, job.result.step if job.result else None) == (2, 400)
    first, second = (service.steps_of_attempt(service.run_dir(job_id), attempt) for attempt in (1, 2))
    assert first + second == list(range(1, 401)), "it stopped right after saving and went on from there"
    kinds = [event.kind.value for event in service.client.events(job_id) if event.kind.value not in ("checkpoint", "evaluated")]
    assert kinds == ["created", "queued", "claimed", "started", "pausing", "paused", "resumed", "queued", "claimed", "started", "succeeded"]
    assert "step" in service.client.log(job_id)
    assert "".join(service.client.follow_log(job_id, tail=3)).count("\n") == 3


def test_a_job_waits_for_its_teacher_and_then_learns_from_it(service: Service) -> None:
    teacher_id = service.submit(epochs=10)
    student_id = service.submit(epochs=2, teacher_job=teacher_id)
    assert service.client.job(student_id).state is JobState.WAITING
    student = service.wait_for(student_id, JobState.SUCCEEDED)
    assert service.client.job(teacher_id).state is JobState.SUCCEEDED
    assert student.result is not None
    assert student.result.num_teacher_parameters == student.result.num_student_parameters
    assert student.metrics["train/term/xrd"] >= 0


def test_duplicate_messages_run_a_job_once(service: Service) -> None:
    broker = Celery(broker=service.stack.environment["CLIPRD_BROKER_URL"], set_as_current=False)
    job_id = service.submit(epochs=20)
    service.wait_for(job_id, JobState.RUNNING)
    for _ in range(3):
        broker.send_task("cliprd.run_job", args=[job_id], queue="default")
    with broker.connection_for_write() as connection:
        redis = connection.default_channel.client
        assert redis.llen("default") == 3, "a busy worker must leave messages to others"
        service.wait_for(job_id, JobState.SUCCEEDED)
        eventually(lambda: redis.llen("default") == 0 or None)
    broker.close()
    assert service.client.job(job_id).attempt == 1
    assert service.steps_of_attempt(service.run_dir(job_id), 1) == list(range(1, 81))


def test_a_failed_job_says_why(service: Service, tmp_path: Path) -> None:
    checkpoint = tmp_path / "student.pt"
    checkpoint.write_bytes(b"these are no weights")
    job_id = service.submit(epochs=1, student={"config": tiny_config(), "pretrained": str(checkpoint)})
    job = service.wait_for(job_id, JobState.FAILED)
    assert job.error is not None
    assert job.error.reason is ErrorReason.INVALID_SPEC
    assert str(checkpoint) in job.error.message
