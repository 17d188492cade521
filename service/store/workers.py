"""The workers there are, as they report themselves at every heartbeat."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timedelta
from enum import StrEnum

from sqlalchemy import delete, select
from sqlalchemy.orm import Session

from service.store.models import Job, Worker
from service.store.session import database_now
from service.store.states import JobState

FORGET_AFTER = timedelta(hours=1)
"""How long a worker that vanished is still listed."""


class WorkerState(StrEnum):
    """What a worker does about its queues."""

    CONSUMING = "consuming"
    """It takes their jobs, one at a time."""
    NOT_CONSUMING = "not_consuming"
    """It runs, but something keeps it from taking jobs."""
    LOST = "lost"
    """It stopped reporting without a farewell."""


@dataclass(frozen=True)
class GpuReading:
    """One GPU of a worker's machine, at its last heartbeat. None: the GPU does not tell."""

    index: int
    """Among those that the worker sees."""
    uuid: str
    name: str
    utilization: float | None
    """Fraction 0-1 of the last moments in which it computed anything."""
    memory_used_bytes: int | None
    """By all processes, and by the driver itself."""
    memory_total_bytes: int | None
    temperature_celsius: float | None


@dataclass(frozen=True)
class WorkerStatus:
    """A worker as it reported last, and what follows from how long ago that is."""

    id: str
    host: str
    state: WorkerState
    queues: list[str]
    problems: list[str]
    """What keeps it from taking jobs, by its own account."""
    job_id: str | None
    """The job it works on."""
    gpus: list[GpuReading]
    started_at: datetime
    heartbeat_at: datetime


def report_worker(
    *,
    session: Session,
    worker_id: str,
    host: str,
    queues: Sequence[str],
    problems: Sequence[str],
    gpus: Sequence[GpuReading],
    valid_seconds: float,
) -> None:
    """A worker's heartbeat; its first one makes it known.

    Args:
        session: The database's.
        worker_id: Names it, also in the jobs it claims.
        host: Name of its machine.
        queues: Those it is to consume.
        problems: What keeps it from that; none: it consumes.
        gpus: Those it sees.
        valid_seconds: It counts as lost when it doesn't report again for so long.
    """
    now = database_now(session)
    worker = session.get(Worker, worker_id)
    if worker is None:
        worker = Worker(id=worker_id, host=host, queues=list(queues), started_at=now)
        session.add(worker)
    worker.problems = list(problems)
    worker.gpus = [asdict(gpu) for gpu in gpus]
    worker.heartbeat_at = now
    worker.expires_at = now + timedelta(seconds=valid_seconds)


def remove_worker(*, session: Session, worker_id: str) -> None:
    """A worker's farewell."""
    session.execute(delete(Worker).where(Worker.id == worker_id))


def forget_workers(*, session: Session) -> None:
    """Drop those that have been lost for long."""
    session.execute(delete(Worker).where(Worker.expires_at < database_now(session) - FORGET_AFTER))


def list_workers(*, session: Session) -> list[WorkerStatus]:
    """All workers that are known, by host and start."""
    now = database_now(session)
    running = select(Job.worker, Job.id).where(Job.state == JobState.RUNNING)
    jobs = {worker: job_id for worker, job_id in session.execute(running) if worker is not None}
    workers = session.scalars(select(Worker).order_by(Worker.host, Worker.started_at, Worker.id))
    return [_status(worker, jobs.get(worker.id), now) for worker in workers]


def holds_a_job(*, session: Session, worker_id: str) -> bool:
    """Whether a worker has a running job whose lease has not run out."""
    held = select(Job.id).where(Job.state == JobState.RUNNING, Job.worker == worker_id, Job.lease_expires_at >= database_now(session))
    return session.scalars(held.limit(1)).first() is not None


def complaint_about_queue(*, session: Session, queue: str) -> str | None:
    """Why no worker takes the jobs of a queue now; None: one does, or will when it is free."""
    now = database_now(session)
    states = {_state(worker, now) for worker in session.scalars(select(Worker)) if queue in worker.queues}
    if WorkerState.CONSUMING in states:
        return None
    if WorkerState.NOT_CONSUMING in states:
        return f"no worker takes queue '{queue}' now: GET /workers says what keeps those that should"
    return f"no worker takes queue '{queue}'"


def _state(worker: Worker, now: datetime) -> WorkerState:
    if worker.expires_at < now:
        return WorkerState.LOST
    return WorkerState.NOT_CONSUMING if worker.problems else WorkerState.CONSUMING


def _status(worker: Worker, job_id: str | None, now: datetime) -> WorkerStatus:
    return WorkerStatus(
        id=worker.id,
        host=worker.host,
        state=_state(worker, now),
        queues=worker.queues,
        problems=worker.problems,
        job_id=job_id,
        gpus=[GpuReading(**gpu) for gpu in worker.gpus],
        started_at=worker.started_at,
        heartbeat_at=worker.heartbeat_at,
    )
