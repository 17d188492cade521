"""The reaper and the worker's app, over a broker in memory: what it sends, when it doesn't, and that nothing stops it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import psutil
import pytest
from celery import Celery
from sqlalchemy import update
from sqlalchemy.orm import Session, sessionmaker

from cliprd_core.run_dir import ErrorReason, ErrorRecord
from cliprd_core.spec import JobSpec
from service.queue import JobQueue
from service.store import recovery
from service.store.artifacts import list_artifacts, register_artifacts
from service.store.blobs import BlobStore
from service.store.events import EventKind, list_events
from service.store.jobs import (
    Cancelled,
    JobState,
    claim_job,
    create_job,
    delete_job,
    finish_job,
    get_job,
    new_lease_token,
    release_job,
    request_cancel,
)
from service.store.kinds import ArtifactKind
from service.store.logs import append_log, read_log
from service.store.models import Job, UnneededBlob
from service.store.session import database_now, make_engine, make_sessions, migrate, reading
from service.store.unneeded_blobs import FIRST_RETRY_SECONDS, LONGEST_RETRY_SECONDS, note_unneeded, take_unneeded
from tests.live import eventually
from worker import boot_clock
from worker.celery_app import create_app
from worker.cleaner import REMOVAL_SECONDS, Cleaner
from worker.holds import Holds
from worker.reaper import Reaper
from worker.rounds import stop_all
from worker.run_cookie import COOKIE_VARIABLE, new_cookie, processes_with_cookie
from worker.settings import WorkerSettings
from worker.shutdown import ShutdownFlag


class Bench:
    def __init__(self, folder: Path, flag: ShutdownFlag) -> None:
        self.queue = f"queue-{uuid.uuid4().hex}"  # the broker in memory is one for the whole process
        url = f"sqlite:///{folder / 'cliprd.db'}"
        migrate(url)
        self.engine = make_engine(url)
        self.sessions: sessionmaker[Session] = make_sessions(self.engine)
        self.settings = WorkerSettings(
            database_url=url,
            broker_url="memory://",
            queues=(self.queue,),
            reaper_seconds=0.02,
            artifacts_root=folder / "artifacts",
            runs_root=folder / "runs",
        )
        self.holds = Holds()
        self.app: Celery = create_app(self.settings, flag, "worker-1", self.holds)
        self.reaper = Reaper(self.settings, self.holds)
        self.cleaner = Cleaner(self.settings)

    def submit(self, *, age_seconds: float, queue: str | None = None) -> str:
        spec = {
            "name": "fake",
            "recipe": "clip",
            "student": {"model": "ViT-T-16"},
            "data": {"train": [{"type": "webdataset", "shards": "none.tar"}]},
            "resources": {"queue": queue or self.queue},
        }
        with self.sessions.begin() as session:
            job = create_job(session=session, spec=JobSpec.model_validate(spec))
            assert job.queued_at is not None
            job.queued_at -= timedelta(seconds=age_seconds)
            return job.id

    def expire(self, job_id: str) -> None:
        with self.sessions.begin() as session:
            assert claim_job(session=session, job_id=job_id, worker="gone", lease_seconds=60) is not None
        with self.sessions.begin() as session:
            job = session.get_one(Job, job_id)
            assert job.lease_expires_at is not None
            job.lease_expires_at -= timedelta(seconds=61)

    def num_messages(self, queue: str | None = None) -> int:
        broker = JobQueue("memory://", timeout_seconds=1)
        try:
            return broker.num_messages([queue or self.queue])[queue or self.queue]
        finally:
            broker.close()

    def job(self, job_id: str) -> Job:
        with reading(self.sessions) as session:
            return get_job(session=session, job_id=job_id)


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    flag = ShutdownFlag()
    bench = Bench(tmp_path, flag)
    yield bench
    bench.reaper.close()
    bench.holds.close()
    bench.app.close()
    bench.engine.dispose()
    flag.close()


def test_an_expired_job_is_queued_and_sent(bench: Bench) -> None:
    job_id = bench.submit(age_seconds=0)
    bench.expire(job_id)
    assert bench.num_messages() == 0
    bench.reaper.run_once()
    job = bench.job(job_id)
    assert (job.state, job.attempt) == (JobState.QUEUED, 1)
    assert job.sent_at is not None
    assert bench.num_messages() == 1


def log_of(bench: Bench, job_id: str) -> str:
    with reading(bench.sessions) as session:
        return read_log(session=session, job_id=job_id)[0]


def test_the_log_tells_that_an_attempt_was_lost(bench: Bench) -> None:
    job_id = bench.submit(age_seconds=0)
    with bench.sessions.begin() as session:
        claimed = claim_job(session=session, job_id=job_id, worker="gone", lease_seconds=-1)
        assert claimed is not None
        append_log(session=session, job_id=job_id, lease_token=claimed.lease_token, text="step 7 of")
    bench.reaper.run_once()
    first, second = log_of(bench, job_id).splitlines()
    assert first == "step 7 of"
    assert second.startswith("Attempt 1 was lost: The worker (gone) stopped reporting")


@contextmanager
def child_that_holds(bench: Bench, job_id: str) -> Iterator[tuple[psutil.Process, psutil.Process]]:
    """A child of this process that has claimed a job and noted it, as a worker's does, and a process of its run, which outlives it."""
    token, cookie = new_lease_token(), new_cookie()
    environment = {**os.environ, COOKIE_VARIABLE: cookie}
    with bench.sessions.begin() as session:
        assert claim_job(session=session, job_id=job_id, worker="here", lease_seconds=600, lease_token=token) is not None
    bench.engine.dispose()
    with subprocess.Popen(["sleep", "120"], env=environment) as run:
        eventually(lambda: list(processes_with_cookie(cookie)) or None)  # a process that has just started has no environment yet
        child = os.fork()
        if child == 0:
            bench.holds.note(token, cookie)
            signal.pause()
        try:
            yield psutil.Process(child), psutil.Process(run.pid)
        finally:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            run.kill()


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_the_job_of_a_killed_child_is_queued_at_once_and_its_run_killed_first(bench: Bench) -> None:
    job_id = bench.submit(age_seconds=0)
    with child_that_holds(bench, job_id) as (child, run):
        while not bench.holds._newest:
            bench.reaper.run_once()
        assert bench.job(job_id).state is JobState.RUNNING
        child.kill()
        eventually(lambda: child.status() == psutil.STATUS_ZOMBIE or None)
        bench.reaper.run_once()
        assert run.status() == psutil.STATUS_ZOMBIE
    job = bench.job(job_id)
    assert (job.state, job.attempt) == (JobState.QUEUED, 1)
    assert bench.num_messages() == 1
    with reading(bench.sessions) as session:
        lost = list_events(session=session, job_id=job_id)[-2]
    assert (lost.kind, lost.data["reason"]) == (EventKind.ATTEMPT_LOST, "worker_lost")
    assert log_of(bench, job_id).startswith("Attempt 1 was lost: The worker's process that ran the job was killed")
    with bench.sessions.begin() as session:
        assert claim_job(session=session, job_id=job_id, worker="next", lease_seconds=60) is not None
    bench.reaper.run_once()
    assert bench.job(job_id).state is JobState.RUNNING, "the next one's lease is another"


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_the_lease_of_a_run_that_can_not_be_killed_runs_out(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("worker.reaper.kill_processes", lambda _: [1])
    job_id = bench.submit(age_seconds=0)
    with child_that_holds(bench, job_id) as (child, _):
        while not bench.holds._newest:
            bench.reaper.run_once()
        child.kill()
        eventually(lambda: child.status() == psutil.STATUS_ZOMBIE or None)
        bench.reaper.run_once()
        assert bench.holds.of_the_dead() == []
    assert bench.job(job_id).state is JobState.RUNNING


def test_notes_that_nobody_reads_cost_nothing_but_themselves() -> None:
    holds = Holds()
    for _ in range(2000):
        holds.note("token", "cookie")
    assert holds.of_the_dead() == [], "it is this process"
    assert list(holds._newest) == [os.getpid()]
    holds.close()


@pytest.mark.parametrize(("seconds", "is_taken"), [(4, True), (16, False), (3600, False)])  # a heartbeat is 10
def test_after_the_databases_clock_jumped_forward_holders_may_renew_their_leases(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, seconds: int, is_taken: bool
) -> None:
    job_id = bench.submit(age_seconds=0)
    bench.reaper.run_once()
    bench.expire(job_id)
    with monkeypatch.context() as patched:
        patched.setattr("worker.reaper.database_now", lambda session: database_now(session) + timedelta(seconds=seconds))
        bench.reaper.run_once()
        bench.reaper.run_once()
        assert (bench.job(job_id).state is JobState.QUEUED) == is_taken
        elapsed = boot_clock.now() + bench.settings.lease_seconds
        patched.setattr("worker.reaper.boot_clock.now", lambda: elapsed)
        bench.reaper.run_once()
    assert bench.job(job_id).state is JobState.QUEUED, "nobody renewed it"


def test_a_lost_message_is_sent_again_but_not_at_once(bench: Bench) -> None:
    bench.submit(age_seconds=1)
    bench.reaper.run_once()
    assert bench.num_messages() == 0, "its message may be under way"
    bench.submit(age_seconds=60)
    bench.reaper.run_once()
    assert bench.num_messages() == 1
    bench.reaper.run_once()
    assert bench.num_messages() == 1, "sent a moment ago"


def test_jobs_that_only_wait_their_turn_do_not_fill_the_broker(bench: Bench) -> None:
    waiting = [bench.submit(age_seconds=60) for _ in range(3)]
    bench.reaper.run_once()
    assert bench.num_messages() == 3
    for _ in range(3):
        with bench.sessions.begin() as session:
            for job_id in waiting:
                job = session.get_one(Job, job_id)
                assert job.sent_at is not None
                job.sent_at -= timedelta(seconds=60)
        bench.reaper.run_once()
    assert bench.num_messages() == 3


def test_a_long_queue_keeps_no_other_from_having_its_lost_messages_sent_again(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    other = f"queue-{uuid.uuid4().hex}"
    for _ in range(3):
        bench.submit(age_seconds=3600)
    bench.reaper.run_once()
    with bench.sessions.begin() as session:
        session.execute(update(Job).values(sent_at=database_now(session) - timedelta(hours=1)))  # each of them just waits its turn
    bench.submit(age_seconds=60, queue=other)
    monkeypatch.setattr(recovery, "MAX_JOBS_SENT", 2)
    bench.reaper.run_once()
    assert bench.num_messages(other) == 1
    assert bench.num_messages() == 3


def test_the_app_runs_one_job_at_a_time_and_speaks_json_only(bench: Bench) -> None:
    conf = bench.app.conf
    assert conf.worker_concurrency == 1
    assert conf.worker_disable_prefetch
    assert not conf.task_acks_late
    assert conf.accept_content == ["json"]
    assert [queue.name for queue in conf.task_queues] == [bench.queue]
    assert "cliprd.run_job" in bench.app.tasks


@pytest.mark.parametrize(
    ("environment", "field"), [({"CLIPRD_QUEUES": " , "}, "queues"), ({"CLIPRD_LEASE_SECONDS": "15"}, "heartbeat_seconds")]
)
def test_settings_that_cannot_work_are_named(environment: dict[str, str], field: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=field):
        WorkerSettings()


def test_queues_come_separated_by_commas(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLIPRD_QUEUES", "default, big.gpu")
    assert WorkerSettings().queues == ("default", "big.gpu")


def test_checkpoints_of_jobs_that_can_not_go_on_are_dropped(bench: Bench, tmp_path: Path) -> None:
    (tmp_path / "state.pt").write_bytes(b"state")
    blobs = BlobStore(bench.settings.artifacts_root)
    kept: dict[str, Path] = {}
    for end in ("failed", "cancelled", "queued", "running"):
        job_id = bench.submit(age_seconds=0)
        with bench.sessions.begin() as session:
            claimed = claim_job(session=session, job_id=job_id, worker="one", lease_seconds=60)
            assert claimed is not None
            held: dict[str, Any] = {"session": session, "job_id": job_id, "lease_token": claimed.lease_token}
            blob = blobs.put_file(tmp_path / "state.pt")
            register_artifacts(**held, kind=ArtifactKind.CHECKPOINT, group="step-0000000001", files={"state.pt": blob}, step=1)
            if end == "failed":
                finish_job(**held, outcome=ErrorRecord(reason=ErrorReason.DIVERGED, message="NaN"))
            elif end == "cancelled":
                request_cancel(session=session, job_id=job_id)
                finish_job(**held, outcome=Cancelled())
            elif end == "queued":
                release_job(**held)
        kept[end] = blobs.path(blob.key)
    bench.cleaner.run_once()
    assert all(path.exists() for path in kept.values()), "for some days, someone may go on from them"
    soon = bench.settings.model_copy(update={"checkpoint_retention_seconds": 0})
    Cleaner(soon).run_once()
    assert [end for end, path in kept.items() if path.exists()] == ["queued", "running"]
    with reading(bench.sessions) as session:
        assert len(list_artifacts(session=session).rows) == 2


def test_run_directories_go_with_deleted_jobs_only(bench: Bench) -> None:
    deleted, restored, kept = (bench.submit(age_seconds=0) for _ in range(3))
    root = bench.settings.runs_root
    for name in (deleted, restored, kept, "of-another-database"):
        (root / name).mkdir(parents=True)
    with bench.sessions.begin() as session:
        for job_id in (deleted, restored, kept):
            request_cancel(session=session, job_id=job_id)
        job = get_job(session=session, job_id=restored)
        columns = {column.name: getattr(job, column.key) for column in Job.__table__.columns}
        for job_id in (deleted, restored):
            delete_job(session=session, job_id=job_id)
    with bench.sessions.begin() as session:
        session.add(Job(**columns))
    bench.cleaner.run_once()
    assert {entry.name for entry in root.iterdir()} == {restored, kept, "of-another-database"}


def test_what_expired_is_queued_while_the_broker_is_away(bench: Bench) -> None:
    """Redis is asked twice in such a round: for what expired, and for what may have lost its message."""
    expired, waiting = bench.submit(age_seconds=0), bench.submit(age_seconds=60)
    bench.expire(expired)
    with socket.socket() as taken:  # bound, but not listening
        taken.bind(("127.0.0.1", 0))
        url = f"redis://127.0.0.1:{taken.getsockname()[1]}/0"
        away = Reaper(bench.settings.model_copy(update={"broker_url": url}), bench.holds)
        away.run_once()
        away.close()
    for job_id in (expired, waiting):
        job = bench.job(job_id)
        assert (job.state, job.sent_at) == (JobState.QUEUED, None), "a later round sends it"
    bench.reaper.run_once()
    assert bench.num_messages() == 1


def test_a_broker_that_says_nothing_is_not_waited_for_for_ever(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("worker.reaper.BROKER_TIMEOUT_SECONDS", 0.2)
    job_id = bench.submit(age_seconds=60)
    bench.expire(job_id)
    with socket.create_server(("127.0.0.1", 0)) as silent:  # the kernel accepts for it
        reaper = Reaper(bench.settings.model_copy(update={"broker_url": f"redis://127.0.0.1:{silent.getsockname()[1]}/0"}), bench.holds)
        thread = threading.Thread(target=reaper.run_once, daemon=True)
        thread.start()
        thread.join(60)
        assert not thread.is_alive()
        reaper.close()
    assert bench.job(job_id).state is JobState.QUEUED


def test_a_part_that_fails_does_not_stop_the_others(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(**_: object) -> None:
        raise RuntimeError("unforeseen")

    monkeypatch.setattr("worker.reaper.requeue_expired", fail)
    bench.submit(age_seconds=60)
    bench.reaper.run_once()
    assert bench.num_messages() == 1


def test_bytes_that_could_not_be_deleted_wait_for_their_next_try_and_hold_up_no_others(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "state.pt").write_bytes(b"state")
    blobs = BlobStore(bench.settings.artifacts_root)
    stored = [blobs.put_file(tmp_path / "state.pt") for _ in range(3)]
    with bench.sessions.begin() as session:
        note_unneeded(session=session, storage_keys=[blob.key for blob in stored])
    protected = sorted(blob.key for blob in stored)[0]
    delete = BlobStore.delete

    def refuse(self: BlobStore, key: str) -> None:
        if key == protected:
            raise PermissionError("immutable")
        delete(self, key)

    def waiting(seconds: float = 0) -> list[str]:
        with bench.sessions() as session:  # rolled back
            return take_unneeded(session=session, now=database_now(session) + timedelta(seconds=seconds))

    with monkeypatch.context() as partly:
        partly.setattr(BlobStore, "delete", refuse)
        bench.cleaner.run_once()
    assert [blob.key for blob in stored if blobs.path(blob.key).exists()] == [protected]
    assert waiting() == [], "its next try is not yet due"
    assert waiting(FIRST_RETRY_SECONDS + 1) == [protected]
    with bench.sessions.begin() as session:
        session.get_one(UnneededBlob, protected).next_try_at = database_now(session)
    bench.cleaner.run_once()
    assert not blobs.path(protected).exists()
    assert waiting(LONGEST_RETRY_SECONDS + 1) == []


def test_what_there_was_no_time_for_is_deleted_by_the_next_round(bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "state.pt").write_bytes(b"state")
    blobs = BlobStore(bench.settings.artifacts_root)
    stored = [blobs.put_file(tmp_path / "state.pt") for _ in range(3)]
    with bench.sessions.begin() as session:
        note_unneeded(session=session, storage_keys=[blob.key for blob in stored])
    now = time.monotonic()
    delete = BlobStore.delete

    def slow(self: BlobStore, key: str) -> None:
        nonlocal now
        now += REMOVAL_SECONDS + 1
        delete(self, key)

    with monkeypatch.context() as patched:
        patched.setattr(BlobStore, "delete", slow)
        patched.setattr("worker.cleaner.time.monotonic", lambda: now)
        bench.cleaner.run_once()
    assert sum(blobs.path(blob.key).exists() for blob in stored) == 2
    bench.cleaner.run_once()
    assert not any(blobs.path(blob.key).exists() for blob in stored)


def test_the_bytes_of_replaced_artifacts_and_of_deleted_jobs_go(bench: Bench, tmp_path: Path) -> None:
    (tmp_path / "state.pt").write_bytes(b"state")
    blobs = BlobStore(bench.settings.artifacts_root)
    stored = [blobs.put_file(tmp_path / "state.pt") for _ in range(3)]
    job_id = bench.submit(age_seconds=0)
    with bench.sessions.begin() as session:
        claimed = claim_job(session=session, job_id=job_id, worker="one", lease_seconds=60)
        assert claimed is not None
        held: dict[str, Any] = {"session": session, "job_id": job_id, "lease_token": claimed.lease_token}
        for name, blob in zip(("a", "b", "b"), stored, strict=True):  # the last one takes its predecessor's place
            register_artifacts(**held, kind=ArtifactKind.CHECKPOINT, group="step-0000000001", files={name: blob}, step=1)
    bench.cleaner.run_once()
    assert [blobs.path(blob.key).exists() for blob in stored] == [True, False, True]
    with bench.sessions.begin() as session:
        held["session"] = session
        finish_job(**held, outcome=ErrorRecord(reason=ErrorReason.DIVERGED, message="NaN"))
        delete_job(session=session, job_id=job_id)
    bench.cleaner.run_once()
    assert not any(blobs.path(blob.key).exists() for blob in stored)


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_deletion_that_hangs_holds_up_neither_leases_nor_forks(bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "state.pt").write_bytes(b"state")
    with bench.sessions.begin() as session:
        note_unneeded(session=session, storage_keys=[BlobStore(bench.settings.artifacts_root).put_file(tmp_path / "state.pt").key])
    hangs, may_end = threading.Event(), threading.Event()

    def hang(_self: BlobStore, _key: str) -> None:
        hangs.set()
        may_end.wait(200)

    monkeypatch.setattr(BlobStore, "delete", hang)
    job_id = bench.submit(age_seconds=0)
    bench.expire(job_id)
    rounds = [bench.cleaner, bench.reaper]
    for one in rounds:
        one.start()
    try:
        assert hangs.wait(60)
        child = os.fork()
        if child == 0:
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        eventually(lambda: bench.job(job_id).state is JobState.QUEUED or None)
        assert not may_end.is_set()
    finally:
        may_end.set()
        stop_all(rounds)
