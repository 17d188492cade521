"""Which run directories can go, on both databases."""

from __future__ import annotations

from datetime import timedelta

import pytest

from cliprd_core.spec import JobSpec
from service.store import jobs
from service.store.artifacts import register_artifacts
from service.store.blobs import StoredBlob, new_key
from service.store.kinds import ArtifactKind
from service.store.models import Job
from service.store.session import database_now, reading
from service.store.unneeded_runs import LocalRun, unneeded_runs
from tests.store_helpers import FAILURE, Sessions, claim, create, finish, spec_dict

DAY = 24 * 3600.0
KEEPING = JobSpec.model_validate(
    spec_dict(
        training={"global_batch_size": 2, "warmup_steps": 1, "checkpoint_every_steps": 10, "keep_checkpoints": {"every_steps": 10}},
    )
)


def unneeded(sessions: Sessions, job_id: str, attempt: int | None = 1, step: int = 0) -> bool:
    runs = {job_id: LocalRun(attempt=attempt, step=step), "unheard-of": LocalRun(attempt=1, step=0)}
    with reading(sessions) as session:
        found = unneeded_runs(session=session, runs=runs, retention_seconds=DAY)
    assert "unheard-of" not in found
    return job_id in found


def mirror(sessions: Sessions, held: jobs.Claim, step: int) -> None:
    lease = {"job_id": held.job.id, "lease_token": held.lease_token}
    blob = StoredBlob(key=new_key(), num_bytes=1, sha256="0" * 64)
    kind, group = ArtifactKind.CHECKPOINT, f"step-{step:010d}"
    with sessions.begin() as session:
        register_artifacts(session=session, kind=kind, group=group, files={"state.json": blob}, step=step, **lease)
        jobs.record_checkpoint(session=session, step=step, **lease)


@pytest.mark.parametrize(("spec", "goes"), [(None, True), (KEEPING, False)])
def test_that_of_a_job_that_finished_long_ago(sessions: Sessions, spec: JobSpec | None, goes: bool) -> None:
    job = create(sessions, spec)
    assert not unneeded(sessions, job.id), "it waits"
    finish(sessions, claim(sessions, job.id), FAILURE)
    assert not unneeded(sessions, job.id), "somebody may retry it"
    with sessions.begin() as session:
        session.get_one(Job, job.id).finished_at = database_now(session) - timedelta(days=1)
    assert unneeded(sessions, job.id) is goes
    with sessions.begin() as session:
        jobs.retry_job(session=session, job_id=job.id)
    assert not unneeded(sessions, job.id)
    finish(sessions, claim(sessions, job.id), FAILURE)
    with sessions.begin() as session:
        jobs.delete_job(session=session, job_id=job.id)
    assert unneeded(sessions, job.id)


def test_that_of_a_job_that_runs_elsewhere(sessions: Sessions) -> None:
    job = create(sessions)
    first = claim(sessions, job.id)
    mirror(sessions, first, 10)
    with sessions.begin() as session:
        jobs.release_job(session=session, job_id=job.id, lease_token=first.lease_token)
    second = claim(sessions, job.id)
    assert not unneeded(sessions, job.id, step=10), "the other machine may not have fetched it, or use this very directory"
    mirror(sessions, second, 20)
    assert unneeded(sessions, job.id, step=20)
    assert not unneeded(sessions, job.id, step=30), "newer than what is stored"
    assert not unneeded(sessions, job.id, attempt=2, step=20), "the running attempt's"
    assert not unneeded(sessions, job.id, attempt=None), "who knows"
