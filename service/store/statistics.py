"""Counts over all jobs, for monitoring."""

from __future__ import annotations

from dataclasses import dataclass, field

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from service.store.attempt_counts import OUTCOMES, ended_attempts
from service.store.models import Job
from service.store.session import database_now
from service.store.states import JobState


@dataclass
class QueueTotals:
    """Of the jobs of one queue."""

    num_attempts: int = 0
    oldest_seconds: float = 0.0
    """How long the longest `queued` job has waited; 0: none is queued."""


@dataclass(frozen=True)
class RunningJob:
    """How fast a job trains."""

    job_id: str
    queue: str
    samples_per_second: float


@dataclass
class JobStatistics:
    """Of all jobs there are."""

    num_jobs: dict[tuple[JobState, str], int] = field(default_factory=dict)
    """By state and queue; every state of a queue that has jobs."""
    queues: dict[str, QueueTotals] = field(default_factory=dict)
    running: list[RunningJob] = field(default_factory=list)
    num_ended: dict[tuple[str, str], int] = field(default_factory=dict)
    """Attempts that ever ended, by queue and outcome; every outcome of a queue that has or had jobs. It never falls."""
    num_expired_leases: int = 0
    """Running jobs whose worker is overdue."""


def job_statistics(*, session: Session) -> JobStatistics:
    """Count the jobs."""
    now = database_now(session)
    found = JobStatistics()
    sums = (func.count(), func.sum(Job.attempt), func.min(Job.queued_at))
    for state, queue, count, num_attempts, oldest in session.execute(
        select(Job.state, Job.queue, *sums).group_by(Job.state, Job.queue).order_by(Job.queue)
    ):
        totals = found.queues.setdefault(queue, QueueTotals())
        totals.num_attempts += int(num_attempts)
        if state is JobState.QUEUED and oldest is not None:
            totals.oldest_seconds = max(0.0, (now - oldest).total_seconds())
        found.num_jobs[state, queue] = count
    found.num_jobs = {(state, queue): found.num_jobs.get((state, queue), 0) for queue in found.queues for state in JobState}
    ended = ended_attempts(session=session)
    queues = sorted(found.queues.keys() | {queue for queue, _ in ended})
    found.num_ended = {(queue, outcome): ended.get((queue, outcome), 0) for queue in queues for outcome in OUTCOMES}
    running = select(Job.id, Job.queue, Job.progress, Job.lease_expires_at).where(Job.state == JobState.RUNNING).order_by(Job.id)
    for job_id, queue, progress, lease_expires_at in session.execute(running):
        found.num_expired_leases += lease_expires_at < now
        if progress is not None:
            found.running.append(RunningJob(job_id, queue, progress["samples_per_second"]))
    return found


def queues_in_use(*, session: Session) -> set[str]:
    """The queues of jobs that have not finished."""
    unfinished = [state for state in JobState if not state.is_finished]
    return set(session.scalars(select(Job.queue).where(Job.state.in_(unfinished)).distinct()))
