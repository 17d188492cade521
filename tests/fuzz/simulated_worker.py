"""A worker without training: it takes jobs from the database and sees them through as a real one does, in a second instead of days."""

from __future__ import annotations

import threading
from pathlib import Path
from random import Random

from sqlalchemy import select
from sqlalchemy.orm import Session, sessionmaker

from service.store import artifacts, jobs
from service.store.blobs import BlobStore
from service.store.errors import LeaseLostError
from service.store.kinds import ArtifactKind
from service.store.leases import lock_held_job, record_checkpoint
from service.store.logs import append_log
from service.store.models import Job
from service.store.recovery import requeue_expired
from service.store.states import JobState
from tests.store_helpers import FAILURE, SUCCESS, evaluated, measured

NUM_STEPS = 12
SECONDS_PER_STEP = 0.02


class SimulatedWorker(threading.Thread):
    """Runs until `stop` is called; `error` is what ended it otherwise.

    Args:
        sessions: The database of the service.
        artifacts_root: The service's artifact store.
        seed: Of what becomes of each run: most succeed, some fail, some are given back, and some are lost with their worker.
    """

    def __init__(self, sessions: sessionmaker[Session], artifacts_root: Path, seed: int) -> None:
        super().__init__(name=f"simulated-worker-{seed}", daemon=True)
        self.error: BaseException | None = None
        self._sessions = sessions
        self._blobs = BlobStore(artifacts_root)
        self._random = Random(seed)
        self._model = artifacts_root.parent / f"model-{seed}"
        self._stopped = threading.Event()

    def stop(self) -> None:
        self._stopped.set()
        self.join()

    def run(self) -> None:
        try:
            while not self._stopped.wait(SECONDS_PER_STEP):
                claim = self.claim()
                if claim is not None:
                    try:
                        self.see_through(claim)
                    except LeaseLostError:
                        continue
        except BaseException as error:
            self.error = error

    def claim(self) -> jobs.Claim | None:
        """A queued job, where there is one."""
        with self._sessions.begin() as session:
            requeue_expired(session=session)
            queued = session.scalars(select(Job.id).where(Job.state == JobState.QUEUED).limit(1)).first()
            return None if queued is None else jobs.claim_next(session=session, job_id=queued, worker=self.name, lease_seconds=5)

    def see_through(self, claim: jobs.Claim) -> None:
        """
        Raises:
            LeaseLostError: another has the job.
        """
        held = {"job_id": claim.job.id, "lease_token": claim.lease_token}
        attempt = claim.attempt
        with self._sessions.begin() as session:
            jobs.mark_started(session=session, **held)
        for step in range(1, NUM_STEPS + 1):
            self._stopped.wait(SECONDS_PER_STEP)
            with self._sessions.begin() as session:
                if not jobs.renew_lease(session=session, lease_seconds=5, **held):
                    return
                job = lock_held_job(session=session, **held)
                if job.cancel_requested_at is not None:
                    jobs.finish_job(session=session, outcome=jobs.Cancelled(), **held)
                    return
                if job.pause_requested_at is not None:
                    jobs.release_job(session=session, **held)
                    return
                append_log(session=session, text=f"step {step}: loss {1 / step}\n", **held)
                jobs.record_metrics(session=session, records=[measured(step, attempt, train_loss=1 / step)], **held)
        self._end(claim, held)

    def _end(self, claim: jobs.Claim, held: dict[str, str]) -> None:
        fate = self._random.random()
        if fate < 0.1:
            return  # lost: its lease runs out
        self._model.write_bytes(self._random.randbytes(2000))
        blob = self._blobs.put_file(self._model)
        with self._sessions.begin() as session:
            jobs.record_evaluations(session=session, records=[evaluated(NUM_STEPS, claim.attempt)], **held)
            record_checkpoint(session=session, step=NUM_STEPS, **held)
            artifacts.register_artifacts(session=session, kind=ArtifactKind.MODEL, group="export", files={"weights": blob}, **held)
            if fate < 0.2:
                jobs.release_job(session=session, **held)
            else:
                jobs.finish_job(session=session, outcome=FAILURE if fate < 0.5 else SUCCESS, **held)
