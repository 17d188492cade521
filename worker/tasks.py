"""The one Celery task, `cliprd.run_job`, and the messages that start it."""

from __future__ import annotations

import logging
import os
import secrets
import shlex
import socket
from collections.abc import Callable, Sequence
from pathlib import Path

from celery import Celery
from kombu.exceptions import KombuError
from pydantic import ValidationError
from redis.exceptions import RedisError
from sqlalchemy.orm import Session, sessionmaker

from cliprd_core.run_dir import ErrorReason, ErrorRecord
from service.logs import about, clear_job, set_job
from service.store.blobs import make_blobs
from service.store.jobs import Claim, QueuedJob, claim_next, finish_job, mark_sent, new_lease_token
from service.store.session import make_engine, make_sessions
from worker.boot_clock import now
from worker.held_job import OUT_OF_REACH, HeldJob
from worker.holds import Holds
from worker.process import TrainingProcess
from worker.run_cookie import new_cookie
from worker.settings import WorkerSettings
from worker.supervisor import Launch, Supervisor

logger = logging.getLogger(__name__)

RUN_JOB = "cliprd.run_job"

BROKER_AWAY = (KombuError, RedisError, OSError)
"""What is raised when the broker cannot be reached just now: kombu wraps some of its transport's errors, and lets others through."""


def run_job(app: Celery, settings: WorkerSettings, should_stop: Callable[[], bool], holds: Holds, *, worker: str, job_id: str) -> None:
    """Claim the best job of the named one's queue as `worker`, and see it through. Where none is queued any more, this does nothing."""
    if should_stop():
        return  # taken while shutting down: the job stays queued, and the reaper sends it again
    engine = make_engine(settings.database_url)  # made here, in the pool's child: connections don't survive a fork
    try:
        sessions = make_sessions(engine)
        token, cookie = new_lease_token(), new_cookie()
        holds.note(token, cookie)
        held_since = now()  # the store counts from later, so this errs on the safe side
        try:
            with sessions.begin() as session:
                claim = claim_next(session=session, job_id=job_id, worker=worker, lease_seconds=settings.lease_seconds, lease_token=token)
        except OUT_OF_REACH as error:
            what = "job %s: not claimed, as the store is out of reach (%s); the reaper sends it again"
            logger.warning(what, job_id, error, extra=about(job_id))
            return
        if claim is None:
            logger.info("nothing is queued where job %s was, so there is nothing to do", job_id)
            return
        try:
            blobs = make_blobs(settings.artifacts_url, settings.artifacts_root)
            job = HeldJob(claim, sessions, blobs, lease_seconds=settings.lease_seconds, held_since=held_since)
        except ValidationError as error:
            queued = refuse(sessions, claim, error)
        else:
            set_job(claim.job.id, claim.attempt)
            queued = Supervisor(job, settings, should_stop, launcher(settings), cookie).run()
        send(app, sessions, queued)
    finally:
        clear_job()
        engine.dispose()


def refuse(sessions: sessionmaker[Session], claim: Claim, error: ValidationError) -> list[QueuedJob]:
    """Fail a job whose stored spec this version does not take, as after an upgrade."""
    message = "This version of the worker does not take the job's spec any more; see `detail`, and submit the job again."
    record = ErrorRecord(reason=ErrorReason.INVALID_SPEC, message=message, detail=str(error))
    with sessions.begin() as session:
        return finish_job(session=session, job_id=claim.job.id, lease_token=claim.lease_token, outcome=record)


def launcher(settings: WorkerSettings) -> Launch:
    """Starts torchrun as the settings say."""

    def launch(run: Path, job: HeldJob, cookie: str) -> TrainingProcess:
        return TrainingProcess.start(
            run,
            attempt=job.attempt,
            num_processes=job.spec.resources.num_processes,
            grace_seconds=settings.grace_seconds,
            trainer=shlex.split(settings.trainer),
            environment={**settings.trainer_environment, **settings.locations_of(run).environment()},
            cookie=cookie,
        )

    return launch


def send(app: Celery, sessions: sessionmaker[Session], queued: Sequence[QueuedJob]) -> None:
    """Send the jobs' messages. A broker that is away costs a warning: the jobs are queued in the store, and a reaper sends them."""
    sent: list[str] = []
    for job_id, queue in queued:
        try:
            app.send_task(RUN_JOB, args=[job_id], queue=queue)
        except BROKER_AWAY as error:
            logger.warning("the broker is out of reach (%s); the reaper will send %d jobs", error, len(queued) - len(sent))
            break
        sent.append(job_id)
    if sent:
        with sessions.begin() as session:
            mark_sent(session=session, job_ids=sent)


def worker_name() -> str:
    """A name for this worker in the store: which process on which machine (`cliprd up` knows its own by that), and something random,
    since containers share both."""
    return f"{socket.gethostname()}:{os.getpid()}:{secrets.token_hex(3)}"
