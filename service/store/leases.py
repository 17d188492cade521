"""A running job's life: claimed under a lease, reported on by the lease's holder, finished or given back.

Every write is guarded by job id and lease token together, so a worker that lost its lease can't write.
"""

from __future__ import annotations

import uuid
from dataclasses import dataclass
from datetime import timedelta

from sqlalchemy import select, update
from sqlalchemy.orm import Session

from cliprd_core.run_dir import ErrorRecord, ResultRecord
from service.store.attempt_counts import CANCELLED, GIVEN_BACK, SUCCEEDED, count_ended
from service.store.due import is_due
from service.store.errors import LeaseLostError
from service.store.events import EventKind, is_recorded, newest_checkpoint, record_event
from service.store.models import Job
from service.store.session import database_now
from service.store.states import JobState
from service.store.transitions import QueuedJob, end_badly, give_back, move, num_lost_attempts, settle_dependents, sources_of


@dataclass(frozen=True)
class Claim:
    """What a worker got when it claimed a job."""

    job: Job
    attempt: int
    lease_token: str


@dataclass(frozen=True)
class Cancelled:
    """Outcome of a run that was stopped because its cancellation was requested."""


Outcome = ResultRecord | ErrorRecord | Cancelled
"""How a run ended: succeeded with this result, failed with this error, or cancelled."""


def new_lease_token() -> str:
    """Names one lease; only its holder knows it."""
    return uuid.uuid4().hex


def claim_job(*, session: Session, job_id: str, worker: str, lease_seconds: float, lease_token: str | None = None) -> Claim | None:
    """Take a queued job. None: it isn't queued (any more), so someone else has it, or it was cancelled, or there is no such job.

    Args:
        session: The database's.
        job_id: The job's.
        worker: Who takes it.
        lease_seconds: How long it is held without renewal.
        lease_token: A new one, where others are to know it before the claim is made; None: one is made here.
    """
    now = database_now(session)
    token = lease_token or new_lease_token()
    claimed = session.execute(
        update(Job)
        .where(Job.id == job_id, Job.state.in_(sources_of(JobState.RUNNING)))
        .values(
            state=JobState.RUNNING,
            attempt=Job.attempt + 1,
            attempt_started_at=now,
            worker=worker,
            lease_token=token,
            lease_expires_at=now + timedelta(seconds=lease_seconds),
        )
        .returning(Job.id)
        .execution_options(synchronize_session=False)
    ).scalar_one_or_none()
    if claimed is None:
        return None
    job = session.get_one(Job, job_id, populate_existing=True)
    record_event(job, EventKind.CLAIMED, now=now, worker=worker)
    return Claim(job=job, attempt=job.attempt, lease_token=token)


def claim_next(*, session: Session, job_id: str, worker: str, lease_seconds: float, lease_token: str | None = None) -> Claim | None:
    """Take, for a message that names `job_id`, the best job of that job's queue: the highest priority, and the oldest of several.

    A queue has a message for each job, so whatever job a message names, as many messages as jobs find one. The other arguments are those
    of `claim_job`.
    """
    now = database_now(session)
    named = session.execute(select(Job.queue, is_due(now, now)).where(Job.id == job_id)).one_or_none()
    if named is None:
        return None
    queue, named_is_due = named
    query = select(Job.id).where(Job.state == JobState.QUEUED, Job.queue == queue, is_due(now, now))
    query = query.order_by(Job.priority.desc(), Job.created_at, Job.id).limit(1)
    best = session.scalars(query.with_for_update(skip_locked=True)).first()
    if best is None and not named_is_due:
        return None
    # None that is not locked: the named one may be, by whoever marks it as sent, and that is worth waiting for.
    return claim_job(session=session, job_id=best or job_id, worker=worker, lease_seconds=lease_seconds, lease_token=lease_token)


def renew_lease(*, session: Session, job_id: str, lease_token: str, lease_seconds: float) -> bool:
    """Keep the job for another `lease_seconds` from now. A lease that ran out is renewed too, as long as nobody took it away.

    Holders renew in time, so what lies between its end and now is the database's clock that was set forward, and no time the job ran.

    Returns:
        Whether it is held. If not, stop at once and write nothing more.
    """
    try:
        job = lock_held_job(session=session, job_id=job_id, lease_token=lease_token)
    except LeaseLostError:
        return False
    now = database_now(session)
    assert job.attempt_started_at is not None, "a running job was claimed"
    assert job.lease_expires_at is not None, "a running job has a lease"
    job.attempt_started_at += max(timedelta(), now - job.lease_expires_at)
    job.lease_expires_at = now + timedelta(seconds=lease_seconds)
    return True


def lock_held_job(*, session: Session, job_id: str, lease_token: str) -> Job:
    """The job's row, locked until the transaction ends.

    Raises:
        LeaseLostError: the token no longer holds the job.
    """
    query = select(Job).where(Job.id == job_id, Job.lease_token == lease_token, Job.state == JobState.RUNNING).with_for_update()
    job = session.scalars(query.execution_options(populate_existing=True)).one_or_none()
    if job is None:
        raise LeaseLostError(job_id)
    return job


def mark_started(*, session: Session, job_id: str, lease_token: str) -> None:
    """Record that the training process runs; `started_at` stays that of the first attempt. Once more, as after a commit whose
    acknowledgement was lost, changes nothing.

    Raises:
        LeaseLostError: the token no longer holds the job.
    """
    job = lock_held_job(session=session, job_id=job_id, lease_token=lease_token)
    now = database_now(session)
    if not is_recorded(job, EventKind.STARTED):
        record_event(job, EventKind.STARTED, now=now)
    if job.started_at is None:
        job.started_at = now


def record_checkpoint(*, session: Session, job_id: str, lease_token: str, step: int) -> None:
    """Tell that the checkpoint of this step is in the artifact store. Once more changes nothing, as of `mark_started`.

    If no earlier attempt had got so far, those no longer count against `max_attempts`: a run that gets on is never given up.

    Raises:
        LeaseLostError: the token no longer holds the job.
    """
    job = lock_held_job(session=session, job_id=job_id, lease_token=lease_token)
    if not is_recorded(job, EventKind.CHECKPOINT, step=step):
        if num_lost_attempts(job) > 1 and step > newest_checkpoint(job):
            job.num_releases = job.attempt - 1
        record_event(job, EventKind.CHECKPOINT, now=database_now(session), step=step)


def finish_job(*, session: Session, job_id: str, lease_token: str, outcome: Outcome) -> list[QueuedJob]:
    """Record how the run ended, and settle the jobs that waited for it as their teacher.

    A run that failed for a reason that may pass is queued again while attempts are left, as `failure_policy` says.

    Returns:
        The jobs that became claimable by this; send their messages after the commit.

    Raises:
        LeaseLostError: the token no longer holds the job.
        ValueError: `Cancelled` without a request for it; `release_job` gives a job back.
    """
    job = lock_held_job(session=session, job_id=job_id, lease_token=lease_token)
    now = database_now(session)
    match outcome:
        case ResultRecord():
            move(job, JobState.SUCCEEDED, now=now)
            job.result = outcome.model_dump(mode="json")
            queued, counted = settle_dependents(session=session, job=job, now=now), SUCCEEDED
        case ErrorRecord():
            queued, counted = end_badly(session=session, job=job, error=outcome, now=now), outcome.reason.value
        case Cancelled():
            if job.cancel_requested_at is None:
                raise ValueError(f"nobody asked to cancel job {job_id}; give it back with release_job")
            job.num_releases += 1
            move(job, JobState.CANCELLED, now=now)
            queued, counted = settle_dependents(session=session, job=job, now=now), CANCELLED
    count_ended(session=session, ended=[(job.queue, counted)])
    return queued


def release_job(*, session: Session, job_id: str, lease_token: str) -> QueuedJob | None:
    """Give a job back unfinished, as a worker does that shuts down or was asked to pause it; the attempt doesn't count as a failure.

    Returns:
        The job, to be sent again after the commit; or None when it isn't queued, since its cancellation or a pause was requested.

    Raises:
        LeaseLostError: the token no longer holds the job.
    """
    job = lock_held_job(session=session, job_id=job_id, lease_token=lease_token)
    queued = give_back(session=session, job=job, now=database_now(session))
    count_ended(session=session, ended=[(job.queue, GIVEN_BACK)])
    return next(iter(queued), None)
