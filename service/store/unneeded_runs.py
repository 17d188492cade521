"""Which run directories of a worker's machine nothing needs any more."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta

from sqlalchemy import and_, exists, func, or_, select
from sqlalchemy.orm import Session

from service.store.control import FINISHED_STATES, deleted_among
from service.store.kinds import ArtifactKind, EventKind
from service.store.models import Artifact, Job, JobEvent
from service.store.session import database_now
from service.store.states import JobState


@dataclass(frozen=True)
class LocalRun:
    """A run directory, as its machine sees it."""

    attempt: int | None
    """The last that used it. None: one of an older version."""
    step: int
    """Of its newest checkpoint; 0: it has none."""


def unneeded_runs(*, session: Session, runs: Mapping[str, LocalRun], retention_seconds: float) -> set[str]:
    """Those of a machine's run directories, by their jobs' ids, that can go: of jobs that are known to be deleted; that finished this long
    ago, so that nobody goes on with them; or that run elsewhere and have a checkpoint in the artifact store which is as new, made there.

    What a spec wants kept (`training.keep_checkpoints.every_steps`) stays until the job is deleted. A directory that the running attempt
    shares has its number, and stays.
    """
    mirrored = select(func.max(Artifact.step)).where(Artifact.job_id == Job.id, Artifact.kind == ArtifactKind.CHECKPOINT).scalar_subquery()
    told = (JobEvent.job_id == Job.id, JobEvent.attempt == Job.attempt, JobEvent.kind == EventKind.CHECKPOINT)
    cutoff = database_now(session) - timedelta(seconds=retention_seconds)
    has_finished = and_(Job.state.in_(FINISHED_STATES), Job.finished_at <= cutoff)
    keeps_some = Job.spec[("training", "keep_checkpoints", "every_steps")].as_integer().is_not(None)
    query = select(Job.id, Job.state, Job.attempt, mirrored).where(
        Job.id.in_(list(runs)), ~keeps_some, or_(has_finished, and_(Job.state == JobState.RUNNING, exists().where(*told)))
    )
    unneeded = deleted_among(session=session, job_ids=list(runs))
    for job_id, state, attempt, mirrored_step in session.execute(query):
        run = runs[job_id]
        has_moved = run.attempt is not None and run.attempt < attempt and (mirrored_step or 0) >= run.step
        if state is not JobState.RUNNING or has_moved:
            unneeded.add(job_id)
    return unneeded
