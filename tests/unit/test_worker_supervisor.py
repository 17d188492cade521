"""The supervisor against a fake trainer and a real store: every way a run can end, and what the store then says."""

import errno
import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from celery import Celery
from sqlalchemy import event
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session

from cliprd_core.run_dir import ERROR_FILE, METRICS_FILE, ErrorReason, checkpoint_dir, complete_checkpoints, step_of
from cliprd_core.spec import JobSpec, merge_over
from cliprd_core.store_dir import lock_shared
from service.store.artifacts import remove_finished_checkpoints
from service.store.blobs import StoredBlob
from service.store.events import list_events
from service.store.failure_policy import what_to_do
from service.store.jobs import (
    JobState,
    QueuedJob,
    request_cancel,
    request_pause,
    resume_job,
    retry_job,
)
from service.store.kinds import ArtifactKind
from service.store.logs import read_log
from service.store.metrics import list_evaluations, series
from service.store.models import Artifact, Job
from service.store.session import reading
from tests.teacher_store_helpers import make_store
from tests.worker_bench import Bench, soon
from worker import held_job
from worker.cleaner import Cleaner
from worker.holds import Holds
from worker.run_cookie import new_cookie
from worker.run_dirs import remove_run_dirs, run_dirs_of
from worker.supervisor import Supervisor
from worker.tasks import launcher, run_job

SLOW = {"steps": "1000", "step_seconds": "0.02"}
STOPPED = {"steps": "60", "holds_at": "40"}
"""For a run that is stopped on its way, however late, and goes on in its next attempt."""


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    bench = Bench(tmp_path)
    yield bench
    bench.engine.dispose()


def test_a_run_that_ends_well(bench: Bench) -> None:
    job_id = bench.submit({"steps": "12"})
    assert bench.run(job_id) == []
    job = bench.job(job_id)
    assert (job.state, job.attempt) == (JobState.SUCCEEDED, 1)
    assert job.started_at is not None
    assert job.result is not None
    assert job.result["num_student_parameters"] == 42
    with reading(bench.sessions) as session:
        losses = series(session=session, job=job)["train/loss"]
        (evaluation,) = list_evaluations(session=session, job_id=job_id).rows
    assert losses.steps == list(range(1, 13))
    assert evaluation.metrics == {"zero_shot_top1": 0.5}
    models = {artifact.name: artifact for artifact in bench.artifacts(job_id, ArtifactKind.MODEL)}
    assert set(models) == {"open_clip_config.json", "open_clip_model.safetensors"}
    assert bench.blobs.path(models["open_clip_model.safetensors"].storage_key).read_bytes() == b"weights of a fake student"
    assert not bench.artifacts(job_id, ArtifactKind.CHECKPOINT), "a finished job needs none"
    assert "attempt 1 starts at step 0" in (bench.run_dir(job_id) / "log.txt").read_text()
    with reading(bench.sessions) as session:
        assert read_log(session=session, job_id=job_id)[0] == (bench.run_dir(job_id) / "log.txt").read_text()
        kinds = [event.kind.value for event in list_events(session=session, job_id=job_id)]
    assert kinds[:4] == ["created", "queued", "claimed", "started"]
    assert kinds[-1] == "succeeded"
    assert {"evaluated"} <= set(kinds[4:-1]) <= {"checkpoint", "evaluated"}  # how many checkpoints are mirrored is a matter of time


def test_a_run_directory_is_kept_while_its_run_goes_on_and_not_after(bench: Bench) -> None:
    job_id = bench.submit(SLOW)

    def remove_all() -> None:
        remove_run_dirs(bench.settings.runs_root, run_dirs_of(bench.settings.runs_root, set), max_seconds=60)

    def try_and_stop() -> None:
        remove_all()
        bench.stop.set()

    thread = soon((bench.run_dir(job_id) / METRICS_FILE).exists, try_and_stop)
    bench.run(job_id)
    thread.join()
    assert (bench.run_dir(job_id) / METRICS_FILE).exists()
    remove_all()
    assert not bench.run_dir(job_id).exists()


def test_a_run_that_says_why_it_failed(bench: Bench) -> None:
    job_id = bench.submit({"error": "diverged"})
    bench.run(job_id)
    error = bench.error(job_id)
    assert error.reason is ErrorReason.DIVERGED
    assert error.detail == "Traceback …"
    with reading(bench.sessions) as session:
        log = read_log(session=session, job_id=job_id)[0]
    assert log.splitlines()[-2] == f"Attempt 1 failed: diverged: {error.message}"
    assert log.splitlines()[-1].startswith("What to do: Clone the job")


def test_the_log_of_a_run_that_really_fails_ends_with_why(bench: Bench) -> None:
    job_id = bench.submit({}, resources={"num_processes": 2})
    Supervisor(bench.held(job_id), bench.settings, bench.stop.is_set, launcher(bench.settings), new_cookie()).run()
    assert bench.error(job_id).reason is ErrorReason.INVALID_DATA
    *_, verdict, advice = bench.log(job_id).splitlines()
    assert verdict.startswith("Attempt 1 failed: invalid_data: ")
    assert "none.tar" in verdict
    assert advice == f"What to do: {what_to_do(bench.error(job_id))}"
    assert "ChildFailedError" not in bench.log(job_id)


def test_a_killed_run_is_queued_again_and_goes_on(bench: Bench) -> None:
    job_id = bench.submit({"crash": "kill"})
    assert bench.run(job_id) == [QueuedJob(job_id, "default")]
    job = bench.job(job_id)
    assert (job.state, job.attempt, job.error) == (JobState.QUEUED, 1, None)
    assert bench.log(job_id).splitlines()[-1].startswith("Attempt 1 failed: worker_lost: The training process was killed (SIGKILL)")


def test_a_run_killed_for_the_last_time_points_at_memory(bench: Bench) -> None:
    job_id = bench.submit({"crash": "kill"}, max_attempts=1)
    assert bench.run(job_id) == []
    error = bench.error(job_id)
    assert error.reason is ErrorReason.WORKER_LOST
    assert "memory" in error.message
    assert bench.log(job_id).splitlines()[-2:] == [f"Attempt 1 failed: worker_lost: {error.message}", f"What to do: {what_to_do(error)}"]


def test_a_run_that_dies_without_a_word_shows_its_last_lines(bench: Bench) -> None:
    job_id = bench.submit({"crash": "exit"})
    bench.run(job_id)
    error = bench.error(job_id)
    assert error.reason is ErrorReason.INTERNAL
    assert "exit code 3" in error.message
    assert "the last words of the fake trainer" in error.detail


def test_an_export_that_has_changed_since_is_no_success(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    job_id = bench.submit({"steps": "10"})
    job = bench.held(job_id)
    put_file = job.put_file_patiently

    def damage_and_put(source: Path) -> StoredBlob:
        if source.name == "open_clip_model.safetensors":
            source.write_bytes(b"weights of a fake studenT")
        return put_file(source)

    monkeypatch.setattr(job, "put_file_patiently", damage_and_put)
    bench.supervisor(job).run()
    assert "open_clip_model.safetensors does not match the SHA-256" in bench.error(job_id).message
    assert not bench.artifacts(job_id, ArtifactKind.MODEL)
    bench.retry(job_id, {"steps": "10"})
    bench.run(job_id)
    assert bench.job(job_id).state is JobState.SUCCEEDED


def test_an_earlier_attempts_verdict_does_not_count(bench: Bench) -> None:
    job_id = bench.submit({"crash": "exit"})
    bench.run_dir(job_id).mkdir(parents=True)
    (bench.run_dir(job_id) / "result.json").write_text("{}")
    (bench.run_dir(job_id) / "error.json").write_text('{"reason": "diverged", "message": "old"}')
    bench.run(job_id)
    assert bench.error(job_id).reason is ErrorReason.INTERNAL


@pytest.mark.parametrize("labels", [SLOW, {**SLOW, "children": "2"}])
def test_cancelling_checkpoints_and_leaves_nothing(bench: Bench, labels: dict[str, str]) -> None:
    job_id = bench.submit(labels)
    family: list[psutil.Process] = []

    def cancel() -> None:
        assert bench.process is not None
        family.extend([psutil.Process(bench.process.pid), *psutil.Process(bench.process.pid).children(recursive=True)])
        with bench.sessions.begin() as session:
            request_cancel(session=session, job_id=job_id)

    soon(lambda: bool(complete_checkpoints(bench.run_dir(job_id))), cancel)
    bench.run(job_id)
    assert bench.job(job_id).state is JobState.CANCELLED
    assert len(family) == 1 + int(labels.get("children", "0"))
    assert not [one for one in family if one.is_running() and one.status() != psutil.STATUS_ZOMBIE]


def test_a_deaf_run_is_killed_after_the_grace_period(bench: Bench) -> None:
    job_id = bench.submit({**SLOW, "deaf": "yes"})
    settings = bench.settings.model_copy(update={"grace_seconds": 0.5})

    def cancel() -> None:
        with bench.sessions.begin() as session:
            request_cancel(session=session, job_id=job_id)

    soon(lambda: bool(complete_checkpoints(bench.run_dir(job_id))), cancel)
    bench.supervisor(bench.held(job_id), settings).run()
    assert bench.job(job_id).state is JobState.CANCELLED


def test_shutdown_gives_the_job_back_and_the_next_attempt_goes_on(bench: Bench) -> None:
    job_id = bench.submit(STOPPED)
    soon(lambda: bool(complete_checkpoints(bench.run_dir(job_id))), bench.stop.set)
    assert bench.run(job_id) == [QueuedJob(job_id, "default")]
    job = bench.job(job_id)
    assert (job.state, job.num_releases) == (JobState.QUEUED, 1)
    bench.stop.clear()
    bench.run(job_id)
    job = bench.job(job_id)
    assert (job.state, job.attempt) == (JobState.SUCCEEDED, 2)
    log = (bench.run_dir(job_id) / "log.txt").read_text()
    assert "attempt 2 starts at step 0" not in log
    with reading(bench.sessions) as session:
        assert series(session=session, job=job)["train/loss"].steps == list(range(1, 61))


def test_a_job_resumes_on_another_machine(bench: Bench, tmp_path: Path) -> None:
    job_id = bench.submit(STOPPED)
    soon(lambda: len(complete_checkpoints(bench.run_dir(job_id))) >= 3, bench.stop.set)
    bench.run(job_id)
    groups = {artifact.group for artifact in bench.artifacts(job_id, ArtifactKind.CHECKPOINT)}
    newest = complete_checkpoints(bench.run_dir(job_id))[-1].name
    assert newest in groups
    assert 1 <= len(groups) <= 2
    bench.stop.clear()
    bench.settings = bench.settings.model_copy(update={"runs_root": tmp_path / "another machine"})
    bench.run(job_id)
    assert bench.job(job_id).state is JobState.SUCCEEDED
    assert f"attempt 2 starts at step {int(newest.removeprefix('step-'))}" in (bench.run_dir(job_id) / "log.txt").read_text()
    kept = {artifact.storage_key for kind in ArtifactKind for artifact in bench.artifacts(job_id, kind)}
    stored = {str(path.relative_to(bench.blobs.root)) for path in bench.blobs.root.rglob("*") if path.is_file()}
    assert stored == kept, "blobs that nothing names"


def test_a_paused_job_saves_and_goes_on_on_another_machine(bench: Bench, tmp_path: Path) -> None:
    job_id = bench.submit(STOPPED)

    def pause() -> None:
        with bench.sessions.begin() as session:
            request_pause(session=session, job_id=job_id)

    soon(lambda: bool(complete_checkpoints(bench.run_dir(job_id))), pause)
    assert bench.run(job_id) == []
    assert bench.job(job_id).state is JobState.PAUSED
    saved = int(complete_checkpoints(bench.run_dir(job_id))[-1].name.removeprefix("step-"))
    with reading(bench.sessions) as session:
        assert series(session=session, job=bench.job(job_id))["train/loss"].steps[-1] == saved, "it stopped right after saving"
    with bench.sessions.begin() as session:
        resume_job(session=session, job_id=job_id)
    bench.settings = bench.settings.model_copy(update={"runs_root": tmp_path / "another machine"})
    bench.run(job_id)
    assert (bench.job(job_id).state, bench.job(job_id).attempt) == (JobState.SUCCEEDED, 2)
    assert f"attempt 2 starts at step {saved}\n" in (bench.run_dir(job_id) / "log.txt").read_text()


def test_a_job_that_runs_for_too_long_saves_and_can_be_tried_again(bench: Bench, tmp_path: Path) -> None:
    job_id = bench.submit(STOPPED, resources={"max_hours": 2.0})
    with bench.sessions.begin() as session:
        session.get_one(Job, job_id).seconds_run = 3600.0
    held = bench.held(job_id)
    assert held.seconds_left == 3600
    supervisor = bench.supervisor(held)
    soon(lambda: bool(complete_checkpoints(bench.run_dir(job_id))), lambda: setattr(supervisor, "_stop_at", time.monotonic()))
    supervisor.run()
    error = bench.error(job_id)
    assert error.reason is ErrorReason.TIMEOUT
    saved = int(complete_checkpoints(bench.run_dir(job_id))[-1].name.removeprefix("step-"))
    assert 0 < saved < 60
    with bench.sessions.begin() as session:
        retry_job(session=session, job_id=job_id)
    bench.settings = bench.settings.model_copy(update={"runs_root": tmp_path / "another machine"})
    bench.run(job_id)
    assert bench.job(job_id).state is JobState.SUCCEEDED
    assert f"attempt 2 starts at step {saved}\n" in (bench.run_dir(job_id) / "log.txt").read_text()


def test_a_full_disk_is_waited_for(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    job_id = bench.submit({"steps": "2"}, max_attempts=2)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("worker.supervisor.write_atomically", full)
    assert bench.run(job_id) == []
    assert bench.job(job_id).state is JobState.QUEUED
    assert bench.log(job_id).startswith("Attempt 1 failed: disk_full: The worker's disk or the artifact store is full")
    assert "What to do" not in bench.log(job_id), "it is tried again by itself"
    bench.run(job_id)
    error = bench.error(job_id)
    assert error.reason is ErrorReason.DISK_FULL
    assert bench.log(job_id).splitlines()[-2:] == [f"Attempt 2 failed: disk_full: {error.message}", f"What to do: {what_to_do(error)}"]


def test_a_run_directory_that_takes_no_log_leaves_the_reason_in_the_stored_one(bench: Bench) -> None:
    job_id = bench.submit({}, max_attempts=1)
    bench.settings.runs_root.write_text("no folder can be made here")
    bench.run(job_id)
    error = bench.error(job_id)
    assert error.reason is ErrorReason.INTERNAL
    with reading(bench.sessions) as session:
        log = read_log(session=session, job_id=job_id)[0]
    assert log == f"Attempt 1 failed: internal: {error.message}\nWhat to do: {what_to_do(error)}\n"


def test_a_record_that_the_store_does_not_take_fails_the_job_and_the_log_says_so(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    job_id = bench.submit({"steps": "5"})
    job = bench.held(job_id)

    def refuse(_: object) -> None:
        raise ValueError("no such metric")

    monkeypatch.setattr(job, "record_metrics", refuse)
    bench.supervisor(job).run()
    error = bench.error(job_id)
    assert error.message == "The worker could not run the job: ValueError: no such metric"
    assert bench.log(job_id).splitlines()[-2] == f"Attempt 1 failed: internal: {error.message}"


def test_the_best_checkpoint_stays_in_the_store(bench: Bench) -> None:
    job_id = bench.submit({"steps": "22", "best": "5-15"}, training={"checkpoint_every_steps": 5, "keep_checkpoints": {"every_steps": 10}})
    bench.run(job_id)
    assert bench.job(job_id).state is JobState.SUCCEEDED
    best = bench.artifacts(job_id, ArtifactKind.BEST_CHECKPOINT)
    assert {(one.step, one.group) for one in best} == {(15, "step-0000000015")}
    assert {one.name for one in best} == {"state.json", "COMPLETE.json"}
    (state,) = [one for one in best if one.name == "state.json"]
    assert json.loads(bench.blobs.path(state.storage_key).read_bytes()) == {"step": 15}
    assert not bench.artifacts(job_id, ArtifactKind.CHECKPOINT)
    assert [step_of(one) for one in complete_checkpoints(bench.run_dir(job_id))] == [10, 20], "those at equal distances stay on the disk"
    with reading(bench.sessions) as session:
        num_known = len(session.query(Artifact).all())
    assert len([path for path in (bench.settings.artifacts_root).rglob("*") if path.is_file()]) == num_known, "no bytes without a row"


def test_a_failed_job_keeps_its_best_checkpoint_and_another_machine_does_not_lose_it(bench: Bench, tmp_path: Path) -> None:
    job_id = bench.submit({"steps": "30", "best": "5", "error": "diverged"})
    bench.run(job_id)
    first = {one.id: one.sha256 for one in bench.artifacts(job_id, ArtifactKind.BEST_CHECKPOINT)}
    assert len(first) == 2
    with bench.sessions.begin() as session:
        assert remove_finished_checkpoints(session=session, older_than_seconds=0)
        retry_job(session=session, job_id=job_id)
    bench.settings = bench.settings.model_copy(update={"runs_root": tmp_path / "another machine"})
    with bench.sessions.begin() as session:
        session.get_one(Job, job_id).spec = merge_over(bench.job(job_id).spec, {"labels": {"error": "timeout", "best": ""}})
    bench.run(job_id)
    assert {one.id: one.sha256 for one in bench.artifacts(job_id, ArtifactKind.BEST_CHECKPOINT)} == first


def test_a_damaged_mirror_falls_back_to_the_older_one(bench: Bench, tmp_path: Path) -> None:
    job_id = bench.submit({"steps": "30", "holds_at": "5-20"})
    soon(lambda: bool(bench.artifacts(job_id, ArtifactKind.CHECKPOINT)), lambda: bench.go_on(job_id, 5))
    soon(lambda: len(complete_checkpoints(bench.run_dir(job_id))) > 1, bench.stop.set)
    bench.run(job_id)
    mirrored = sorted(bench.artifacts(job_id, ArtifactKind.CHECKPOINT), key=lambda artifact: (artifact.step, artifact.name))
    older, newest = mirrored[0].step, mirrored[-1].step
    assert older != newest
    (state,) = [artifact for artifact in mirrored if artifact.step == newest and artifact.name == "state.json"]
    bench.blobs.path(state.storage_key).write_text('{"step": 9999999}')
    bench.stop.clear()
    bench.settings = bench.settings.model_copy(update={"runs_root": tmp_path / "another machine"})
    bench.run(job_id)
    assert f"attempt 2 starts at step {older}\n" in (bench.run_dir(job_id) / "log.txt").read_text()


def test_a_lost_lease_kills_at_once_and_writes_nothing_more(bench: Bench) -> None:
    job_id = bench.submit(SLOW)
    held = bench.held(job_id)

    soon(lambda: bool(complete_checkpoints(bench.run_dir(job_id))), lambda: bench.take_away(job_id))
    assert bench.supervisor(held).run() == []
    job = bench.job(job_id)
    assert (job.state, job.num_releases, job.error) == (JobState.QUEUED, 0, None)
    assert bench.process is not None
    assert not bench.process.is_running()


def test_an_outage_of_the_store_costs_nothing(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    job_id = bench.submit({"steps": "80", "holds_at": "5-60"})
    held = bench.held(job_id)
    is_away, num_refused = threading.Event(), 0
    begin = bench.sessions.begin

    def begin_unless_away() -> Any:
        nonlocal num_refused
        if is_away.is_set():
            num_refused += 1
            raise OperationalError("SELECT", {}, ConnectionError("store away"))
        return begin()

    monkeypatch.setattr(held._sessions, "begin", begin_unless_away)

    def go_away() -> None:
        is_away.set()
        bench.go_on(job_id, 5)

    def come_back() -> None:
        is_away.clear()
        bench.go_on(job_id, 60)

    soon(lambda: bool(complete_checkpoints(bench.run_dir(job_id))), go_away)
    soon(lambda: num_refused > 10 and checkpoint_dir(bench.run_dir(job_id), 60) in complete_checkpoints(bench.run_dir(job_id)), come_back)
    bench.supervisor(held).run()
    job = bench.job(job_id)
    assert (job.state, job.attempt) == (JobState.SUCCEEDED, 1)
    with reading(bench.sessions) as session:
        assert series(session=session, job=job)["train/loss"].steps == list(range(1, 81))


def test_a_stop_from_elsewhere_gives_the_job_back(bench: Bench) -> None:
    job_id = bench.submit(SLOW)

    def terminate() -> None:
        assert bench.process is not None
        os.kill(bench.process.pid, signal.SIGTERM)

    soon(lambda: bool(complete_checkpoints(bench.run_dir(job_id))), terminate)
    assert bench.run(job_id) == [QueuedJob(job_id, "default")]


@pytest.mark.parametrize("by", ["job", "artifact"])
def test_an_earlier_job_is_the_teacher(bench: Bench, by: str) -> None:
    teacher_id = bench.submit({"steps": "2"})
    if by == "job":
        student_id = bench.submit({"steps": "2"}, recipe="clip_rd", teacher={"job": teacher_id})
        assert bench.job(student_id).state is JobState.WAITING
        assert bench.run(teacher_id) == [QueuedJob(student_id, "default")]
    else:
        bench.run(teacher_id)
        artifact = bench.artifacts(teacher_id, ArtifactKind.MODEL)[0]
        student_id = bench.submit({"steps": "2"}, recipe="clip_rd", teacher={"artifact": artifact.id})
    seen: dict[str, Any] = {}

    def look(run: Path) -> None:
        seen["spec"] = json.loads((run / "spec.json").read_text())
        seen["files"] = sorted(path.name for path in (run / "teachers" / "teacher").iterdir())

    bench.before_launch = look
    bench.run(student_id)
    assert bench.job(student_id).state is JobState.SUCCEEDED
    assert seen["spec"]["teacher"]["model"] == f"local-dir:{bench.run_dir(student_id) / 'teachers' / 'teacher'}"
    assert seen["files"] == ["open_clip_config.json", "open_clip_model.safetensors"]


def test_a_job_that_failed_leaves_no_teacher_and_in_time_no_run_directory(bench: Bench) -> None:
    teacher_id = bench.submit({"steps": "2"})
    bench.run(teacher_id)
    student_id = bench.submit({"steps": "20", "error": "diverged"}, recipe="clip_rd", teacher={"job": teacher_id})
    bench.run(student_id)
    assert complete_checkpoints(bench.run_dir(student_id))
    assert not (bench.run_dir(student_id) / "teachers").exists()
    Cleaner(bench.settings).run_once()
    assert bench.run_dir(student_id).exists(), "a retry goes on there"
    Cleaner(bench.settings.model_copy(update={"checkpoint_retention_seconds": 0})).run_once()
    assert not list(bench.settings.runs_root.iterdir())
    bench.retry(student_id, {"steps": "20"})
    bench.run(student_id)
    assert bench.job(student_id).state is JobState.SUCCEEDED


def test_each_of_several_teachers_has_its_folder(bench: Bench) -> None:
    teacher_ids = [bench.submit({"steps": "2"}) for _ in range(2)]
    for teacher_id in teacher_ids:
        bench.run(teacher_id)
    teachers = [*({"job": teacher_id} for teacher_id in teacher_ids), {"model": "ViT-B-16", "pretrained": "openai"}]
    student_id = bench.submit({"steps": "2"}, recipe="clip_rd", teachers=teachers)
    bench.run(student_id)
    assert bench.job(student_id).state is JobState.SUCCEEDED
    folder = bench.run_dir(student_id) / "teachers"
    spec = JobSpec.model_validate_json((bench.run_dir(student_id) / "spec.json").read_text())
    assert [one.model for one in spec.teachers] == [f"local-dir:{folder / 'teachers.0'}", f"local-dir:{folder / 'teachers.1'}", "ViT-B-16"]


def test_a_damaged_teacher_is_refused(bench: Bench) -> None:
    teacher_id = bench.submit({"steps": "2"})
    bench.run(teacher_id)
    bench.blobs.path(bench.artifacts(teacher_id, ArtifactKind.MODEL)[0].storage_key).write_bytes(b"rot")
    student_id = bench.submit({"steps": "2"}, recipe="clip_rd", teacher={"job": teacher_id})
    bench.run(student_id)
    error = bench.error(student_id)
    assert error.reason is ErrorReason.TEACHER_UNAVAILABLE
    assert "SHA-256" in error.message
    assert bench.log(student_id).splitlines()[-2:] == [
        f"Attempt 1 failed: teacher_unavailable: {error.message}",
        f"What to do: {what_to_do(error)}",
    ]


@pytest.mark.parametrize("written", ["mark_started", "record_checkpoint", "finish_job"])
def test_a_commit_whose_acknowledgement_is_lost_counts_once(bench: Bench, monkeypatch: pytest.MonkeyPatch, written: str) -> None:
    job_id = bench.submit({"steps": "30", "holds_at": "20"})
    write, sessions = getattr(held_job, written), list[Session]()

    def lose_the_answer(_: Session) -> None:
        raise OperationalError("COMMIT", {}, ConnectionError("the answer was lost"))

    def write_and_lose_the_answer(*, session: Session, **arguments: Any) -> Any:
        if not sessions:
            event.listen(session, "after_commit", lose_the_answer)
        sessions.append(session)
        return write(session=session, **arguments)

    monkeypatch.setattr(held_job, written, write_and_lose_the_answer)
    soon(lambda: bool(bench.artifacts(job_id, ArtifactKind.CHECKPOINT)), lambda: bench.go_on(job_id, 20))
    assert bench.run(job_id) == []
    assert sessions
    assert bench.job(job_id).state is JobState.SUCCEEDED
    with reading(bench.sessions) as session:
        events = [(one.kind.value, json.dumps(one.data)) for one in list_events(session=session, job_id=job_id)]
    assert len(events) == len(set(events)), events
    (weights,) = [one for one in bench.artifacts(job_id, ArtifactKind.MODEL) if one.name.endswith("safetensors")]
    assert bench.blobs.path(weights.storage_key).read_bytes() == b"weights of a fake student"
    assert not (bench.run_dir(job_id) / "checkpoints").exists(), "as after any success"


def test_a_stored_spec_that_this_version_refuses_fails_the_job(bench: Bench) -> None:
    job_id = bench.submit({})
    with bench.sessions.begin() as session:
        session.get_one(Job, job_id).spec = {"name": "from another version", "unheard_of": 1}
    app = Celery(broker=bench.settings.broker_url, set_as_current=False)
    run_job(app, bench.settings, bench.stop.is_set, Holds(), worker="worker-1", job_id=job_id)
    error = bench.error(job_id)
    assert error.reason is ErrorReason.INVALID_SPEC
    assert "unheard_of" in error.detail


def test_a_worker_that_was_stopped_just_after_its_claim_touches_nothing_of_the_next_attempt(bench: Bench) -> None:
    job_id = bench.submit({"steps": "5"})
    job = bench.held(job_id)
    bench.take_away(job_id)
    job.held_since -= bench.settings.lease_seconds + 1
    verdict = bench.run_dir(job_id) / ERROR_FILE
    verdict.parent.mkdir(parents=True)
    verdict.write_text("of the attempt that has the job now")
    assert bench.supervisor(job).run() == []
    assert verdict.exists()
    assert bench.process is None
    assert bench.job(job_id).state is JobState.QUEUED


def test_teacher_stores_over_the_limit_are_deleted_before_training_but_none_in_use(bench: Bench) -> None:
    root = bench.settings.teacher_store_root
    idle, used = make_store(root), make_store(root, seed=1)
    lock = lock_shared(root / used)
    assert lock is not None
    bench.settings = bench.settings.model_copy(update={"teacher_store_max_bytes": 0})
    job_id = bench.submit({"steps": "5"})
    bench.run(job_id)
    os.close(lock)
    assert bench.job(job_id).state is JobState.SUCCEEDED
    assert [path.name for path in root.iterdir()] == [used]
    assert idle != used


def test_teacher_stores_that_can_not_be_looked_at_are_no_reason_to_fail(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("worker.supervisor.evict", refuse)
    job_id = bench.submit({"steps": "5"})
    bench.run(job_id)
    assert bench.job(job_id).state is JobState.SUCCEEDED
