"""A store, a blob store and supervisors that run the fake trainer, for tests of what a worker does with a job."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sqlalchemy.orm import Session, sessionmaker

from cliprd_core.run_dir import LOG_FILE, ErrorRecord
from cliprd_core.spec import JobSpec, merge_over
from service.store.blobs import BlobStore
from service.store.jobs import JobState, QueuedJob, claim_job, create_job, get_job, requeue_expired, retry_job
from service.store.kinds import ArtifactKind
from service.store.models import Artifact, Job
from service.store.session import make_engine, make_sessions, migrate, reading
from tests.fake_trainer import go_on_file
from worker.boot_clock import now
from worker.held_job import HeldJob
from worker.process import TrainingProcess, trainer_environment
from worker.run_cookie import new_cookie
from worker.settings import WorkerSettings
from worker.supervisor import Supervisor

FAKE_TRAINER = Path(__file__).parent / "fake_trainer.py"
LEASE_SECONDS = 120.0
"""Longer than any machine is too busy to renew a lease: a test that wants one to be lost takes it away."""
TIMEOUT_SECONDS = 120.0


class Bench:
    """A store, a blob store and a worker's settings."""

    def __init__(self, folder: Path) -> None:
        url = f"sqlite:///{folder / 'cliprd.db'}"
        migrate(url)
        self.engine = make_engine(url)
        self.sessions: sessionmaker[Session] = make_sessions(self.engine)
        self.blobs = BlobStore(folder / "artifacts")
        self.settings = WorkerSettings(
            database_url=url,
            artifacts_root=folder / "artifacts",
            runs_root=folder / "runs",
            teacher_store_root=folder / "teacher-stores",
            lease_seconds=LEASE_SECONDS,
            heartbeat_seconds=0.2,
            grace_seconds=60,
            poll_seconds=0.05,
        )
        self.stop = threading.Event()
        self.process: TrainingProcess | None = None
        self.before_launch: Callable[[Path], object] = lambda _: None
        """Called with the prepared run directory."""

    def submit(self, labels: dict[str, str], max_attempts: int = 3, **changes: Any) -> str:
        spec: dict[str, Any] = {
            "name": "fake",
            "recipe": "clip",
            "labels": labels,
            "student": {"model": "ViT-T-16"},
            "data": {"train": [{"type": "webdataset", "shards": "none.tar"}]},
        }
        with self.sessions.begin() as session:
            return create_job(session=session, spec=JobSpec.model_validate(merge_over(spec, changes)), max_attempts=max_attempts).id

    def held(self, job_id: str) -> HeldJob:
        held_since = now()
        with self.sessions.begin() as session:
            claim = claim_job(session=session, job_id=job_id, worker="test", lease_seconds=LEASE_SECONDS)
        assert claim is not None
        return HeldJob(claim, self.sessions, self.blobs, lease_seconds=LEASE_SECONDS, held_since=held_since)

    def supervisor(self, job: HeldJob, settings: WorkerSettings | None = None) -> Supervisor:
        def launch(run: Path, job: HeldJob, cookie: str) -> TrainingProcess:
            self.before_launch(run)
            command = [sys.executable, str(FAKE_TRAINER), str(run / "spec.json")]
            self.process = TrainingProcess(run, command, trainer_environment(job.attempt, 1), cookie)
            return self.process

        return Supervisor(job, settings or self.settings, self.stop.is_set, launch, new_cookie())

    def run(self, job_id: str) -> list[QueuedJob]:
        return self.supervisor(self.held(job_id)).run()

    def run_dir(self, job_id: str) -> Path:
        return self.settings.runs_root / job_id

    def job(self, job_id: str) -> Job:
        with reading(self.sessions) as session:
            return get_job(session=session, job_id=job_id)

    def artifacts(self, job_id: str, kind: ArtifactKind) -> list[Artifact]:
        with reading(self.sessions) as session:
            return list(session.query(Artifact).where(Artifact.job_id == job_id, Artifact.kind == kind).all())

    def take_away(self, job_id: str) -> None:
        """Let a job's lease run out."""
        with self.sessions.begin() as session:
            job = session.get_one(Job, job_id)
            job.lease_expires_at = job.created_at
            session.flush()
            assert requeue_expired(session=session).queued == [QueuedJob(job_id, "default")]

    def go_on(self, job_id: str, step: int) -> None:
        """Let the fake trainer go on from a step at which its label `holds_at` holds it."""
        go_on_file(self.run_dir(job_id), step).touch()

    def retry(self, job_id: str, labels: dict[str, str]) -> None:
        """Queue a failed job again, with other labels for the fake trainer."""
        with self.sessions.begin() as session:
            job = session.get_one(Job, job_id)
            job.spec = {**job.spec, "labels": labels}
            retry_job(session=session, job_id=job_id)

    def log(self, job_id: str) -> str:
        """What the training processes printed on this machine."""
        return (self.run_dir(job_id) / LOG_FILE).read_text()

    def error(self, job_id: str) -> ErrorRecord:
        job = self.job(job_id)
        assert job.state is JobState.FAILED, job.state
        return ErrorRecord.model_validate(job.error)


def soon(condition: Callable[[], bool], act: Callable[[], None]) -> threading.Thread:
    """Do something, from another thread, once a condition holds: the supervisor has the main thread."""

    def wait_and_act() -> None:
        deadline = time.monotonic() + TIMEOUT_SECONDS
        while not condition():
            assert time.monotonic() < deadline, f"what was waited for did not come: {condition}"
            time.sleep(0.02)
        act()

    thread = threading.Thread(target=wait_and_act, daemon=True)
    thread.start()
    return thread
