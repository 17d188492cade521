"""The worker that `make fuzz` walks beside takes jobs to their ends, so that it is known to work before a long round."""

from __future__ import annotations

import time
from pathlib import Path

from service.store.control import request_cancel, request_pause
from service.store.states import JobState
from tests.fuzz.simulated_worker import SimulatedWorker
from tests.store_helpers import Sessions, create, read

TIMEOUT_SECONDS = 60.0


def test_jobs_are_seen_through_and_requests_heard(sessions: Sessions, tmp_path: Path) -> None:
    worker = SimulatedWorker(sessions, tmp_path / "artifacts", seed=0)
    job_ids = [create(sessions).id for _ in range(4)]
    worker.start()
    deadline = time.monotonic() + TIMEOUT_SECONDS
    asked: set[str] = set()
    while any(not (read(sessions, job_id).state.is_finished or read(sessions, job_id).state is JobState.PAUSED) for job_id in job_ids):
        assert worker.error is None
        assert time.monotonic() < deadline
        running = [job_id for job_id in job_ids[:2] if read(sessions, job_id).state is JobState.RUNNING and job_id not in asked]
        for job_id in running:
            with sessions.begin() as session:
                (request_cancel if job_id == job_ids[0] else request_pause)(session=session, job_id=job_id)
            asked.add(job_id)
        time.sleep(0.01)
    worker.stop()
    assert worker.error is None
    states = [read(sessions, job_id).state for job_id in job_ids]
    if asked == set(job_ids[:2]):  # else the first were faster than the looks at them
        assert states[:2] == [JobState.CANCELLED, JobState.PAUSED]
    assert {JobState.SUCCEEDED, JobState.FAILED} & set(states[2:])
