"""The worker that `make fuzz` walks beside, so that it is known to work before a long round."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from service.store import metrics
from service.store.control import request_cancel, request_pause
from service.store.models import Job
from service.store.session import reading
from service.store.states import JobState
from tests.fuzz import simulated_worker
from tests.fuzz.simulated_worker import NUM_STEPS, SimulatedWorker
from tests.store_helpers import Sessions, create, read


@pytest.fixture
def worker(sessions: Sessions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SimulatedWorker:
    monkeypatch.setattr(simulated_worker, "SECONDS_PER_STEP", 0.0)
    return SimulatedWorker(sessions, tmp_path / "artifacts", seed=0)


def test_a_job_is_seen_through(worker: SimulatedWorker, sessions: Sessions) -> None:
    job_id = create(sessions).id
    while not read(sessions, job_id).state.is_finished:  # it is given back now and then
        claim = worker.claim()
        assert claim is not None
        worker.see_through(claim)
    with reading(sessions) as session:
        series = metrics.series(session=session, job=read(sessions, job_id))
        evaluations = metrics.list_evaluations(session=session, job_id=job_id)
    assert series["train/loss"].steps == list(range(1, NUM_STEPS + 1))
    assert len(evaluations.rows) == 1
    assert worker.claim() is None


@pytest.mark.parametrize(("ask", "state"), [(request_cancel, JobState.CANCELLED), (request_pause, JobState.PAUSED)])
def test_requests_are_heard(worker: SimulatedWorker, sessions: Sessions, ask: Callable[..., Job], state: JobState) -> None:
    job_id = create(sessions).id
    claim = worker.claim()
    assert claim is not None
    with sessions.begin() as session:
        ask(session=session, job_id=job_id)
    worker.see_through(claim)
    assert read(sessions, job_id).state is state
