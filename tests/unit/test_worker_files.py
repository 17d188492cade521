"""What a run needs from the artifact store: an absent store is waited for, a full disk is one, and only lost bytes are passed over."""

import errno
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from cliprd_core.run_dir import LOG_FILE, ErrorReason, complete_checkpoints, step_of
from service.store.blobs import BlobsUnreachableError
from service.store.jobs import JobState, request_cancel
from service.store.kinds import ArtifactKind
from service.store.models import Artifact
from tests.worker_bench import Bench, soon


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    bench = Bench(tmp_path)
    yield bench
    bench.engine.dispose()


class Failing:
    """A reading of blobs that fails on the way, the first `times`."""

    def __init__(self, bench: Bench, error: OSError, times: int) -> None:
        self._stream = bench.blobs.stream
        self._error = error
        self.times_left = times

    def __call__(self, key: str) -> Iterator[bytes]:
        yield next(self._stream(key))[:3]
        if self.times_left:
            self.times_left -= 1
            raise self._error
        yield from self._stream(key, start=3)


def interrupted(bench: Bench, tmp_path: Path) -> tuple[str, int]:
    """A job that was given back, to be resumed on a machine that has nothing of it; with the step of its newest checkpoint."""
    job_id = bench.submit({"steps": "40", "error": "timeout"})
    bench.run(job_id)
    bench.retry(job_id, {"steps": "40"})
    step = max(one.step or 0 for one in bench.artifacts(job_id, ArtifactKind.CHECKPOINT))
    bench.settings = bench.settings.model_copy(update={"runs_root": tmp_path / "another machine"})
    return job_id, step


def start_of(bench: Bench, job_id: str, attempt: int) -> int:
    (line,) = [line for line in bench.log(job_id).splitlines() if line.startswith(f"attempt {attempt} starts at step ")]
    return int(line.rsplit(" ", 1)[1])


def test_an_artifact_store_that_is_away_delays_a_resume(bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job_id, step = interrupted(bench, tmp_path)
    failing = Failing(bench, BlobsUnreachableError("503 Slow Down"), times=2)
    monkeypatch.setattr(bench.blobs, "stream", failing)
    bench.run(job_id)
    assert failing.times_left == 0
    assert bench.job(job_id).state is JobState.SUCCEEDED
    assert start_of(bench, job_id, 2) == step > 0


def test_a_disk_that_is_full_as_a_job_resumes_is_waited_for(bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job_id, step = interrupted(bench, tmp_path)
    monkeypatch.setattr(bench.blobs, "stream", Failing(bench, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), times=1))
    bench.run(job_id)
    assert bench.job(job_id).state is JobState.QUEUED, "no attempt at training without the checkpoint"
    assert complete_checkpoints(bench.run_dir(job_id)) == []
    bench.run(job_id)
    assert bench.job(job_id).state is JobState.SUCCEEDED
    assert start_of(bench, job_id, 3) == step > 0


def test_a_missing_mirror_is_passed_over(bench: Bench, tmp_path: Path) -> None:
    job_id, _ = interrupted(bench, tmp_path)
    for one in bench.artifacts(job_id, ArtifactKind.CHECKPOINT):
        bench.blobs.delete(one.storage_key)
    bench.run(job_id)
    assert start_of(bench, job_id, 2) == 0


def test_an_artifact_store_that_is_away_delays_a_distillation(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher_id = bench.submit({"steps": "2"})
    bench.run(teacher_id)
    student_id = bench.submit({"steps": "2"}, recipe="clip_rd", teacher={"job": teacher_id})
    failing = Failing(bench, BlobsUnreachableError("503 Slow Down"), times=1)
    monkeypatch.setattr(bench.blobs, "stream", failing)
    bench.run(student_id)
    assert failing.times_left == 0
    assert bench.job(student_id).state is JobState.SUCCEEDED


def test_a_disk_too_full_for_the_teacher_is_waited_for(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher_id = bench.submit({"steps": "2"})
    bench.run(teacher_id)
    student_id = bench.submit({"steps": "2"}, max_attempts=2, recipe="clip_rd", teacher={"job": teacher_id})
    monkeypatch.setattr(bench.blobs, "stream", Failing(bench, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), times=2))
    bench.run(student_id)
    assert bench.job(student_id).state is JobState.QUEUED
    bench.run(student_id)
    assert bench.error(student_id).reason is ErrorReason.DISK_FULL


def test_a_damaged_local_checkpoint_does_not_hide_its_intact_mirror(bench: Bench) -> None:
    job_id = bench.submit({"steps": "40", "error": "timeout"})
    bench.run(job_id)
    bench.retry(job_id, {"steps": "40"})
    newest = complete_checkpoints(bench.run_dir(job_id))[-1]
    (newest / "state.json").write_text('{"step": 1}')
    bench.run(job_id)
    assert start_of(bench, job_id, 2) == step_of(newest) > 1


def test_a_mirror_of_a_damaged_checkpoint_is_passed_over(bench: Bench, tmp_path: Path) -> None:
    job_id, step = interrupted(bench, tmp_path)
    (state,) = [one for one in bench.artifacts(job_id, ArtifactKind.CHECKPOINT) if one.step == step and one.name == "state.json"]
    bench.blobs.path(state.storage_key).write_bytes(b"stored like this")
    with bench.sessions.begin() as session:
        session.get_one(Artifact, state.id).sha256 = hashlib.sha256(b"stored like this").hexdigest()
    bench.run(job_id)
    assert bench.job(job_id).state is JobState.SUCCEEDED
    assert start_of(bench, job_id, 2) < step


@pytest.mark.parametrize("ends_as", [JobState.QUEUED, JobState.CANCELLED])
def test_a_job_that_waits_for_the_artifact_store_can_be_stopped(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ends_as: JobState
) -> None:
    job_id, _ = interrupted(bench, tmp_path)
    failing = Failing(bench, BlobsUnreachableError("403 Forbidden"), times=1_000_000)
    monkeypatch.setattr(bench.blobs, "stream", failing)

    def stop() -> None:
        if ends_as is JobState.QUEUED:
            bench.stop.set()
            return
        with bench.sessions.begin() as session:
            request_cancel(session=session, job_id=job_id)

    soon(lambda: failing.times_left < 1_000_000, stop)
    bench.run(job_id)
    assert bench.job(job_id).state is ends_as
    assert not (bench.run_dir(job_id) / LOG_FILE).exists(), "no training was started"
