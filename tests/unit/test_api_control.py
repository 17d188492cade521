"""Jobs that exist, steered over the API."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from service.settings import Settings
from service.store import jobs
from service.store.session import make_engine, make_sessions
from tests.store_helpers import Sessions, claim, spec_dict, write_table


@pytest.fixture
def sessions(client: TestClient, settings: Settings, tmp_path: Path) -> Any:
    """The database of the running `client`, beside the data that `spec_dict` names."""
    write_table(tmp_path)
    engine = make_engine(settings.database_url)
    yield make_sessions(engine)
    engine.dispose()


def submit(client: TestClient, **changes: Any) -> dict[str, Any]:
    response = client.post("/jobs", json=spec_dict(**changes))
    assert response.status_code == 201, response.text
    job: dict[str, Any] = response.json()
    return job


def test_pausing_and_resuming(client: TestClient, sessions: Sessions) -> None:
    queued, running = submit(client), submit(client)
    claimed = claim(sessions, running["id"])
    for _ in range(2):
        response = client.post(queued["links"]["pause"])
        assert (response.status_code, response.json()["state"]) == (200, "paused")
        response = client.post(running["links"]["pause"])
        assert (response.status_code, response.json()["state"]) == (202, "running")
        assert response.json()["pause_requested_at"] is not None
    with sessions.begin() as session:
        assert jobs.release_job(session=session, job_id=running["id"], lease_token=claimed.lease_token) is None
    assert [job["id"] for job in client.get("/jobs", params={"state": "paused"}).json()["jobs"]] == [running["id"], queued["id"]]
    for job in (queued, running):
        response = client.post(job["links"]["resume"])
        assert (response.status_code, response.json()["state"]) == (200, "queued")
        with sessions() as session:
            assert jobs.get_job(session=session, job_id=job["id"]).sent_at is not None


def test_what_is_being_cancelled_or_has_ended_is_not_paused(client: TestClient, sessions: Sessions) -> None:
    running, ended = submit(client), submit(client)
    claim(sessions, running["id"])
    for job in (running, ended):
        client.post(job["links"]["cancel"])
        for link, status in (("pause", 409), ("resume", 200 if job is running else 409)):
            response = client.post(job["links"][link])
            assert response.status_code == status, response.text
    assert client.post("/jobs/00000000-none/pause").status_code == 404
