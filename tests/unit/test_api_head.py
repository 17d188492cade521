"""HEAD is GET without the body, everywhere (RFC 9110, section 9.3.2)."""

from __future__ import annotations

import pytest
from fastapi.testclient import TestClient

from service.settings import Settings
from service.store.session import make_engine, make_sessions
from tests.store_helpers import create

VARYING = {"date", "content-length"}


@pytest.fixture
def job_id(client: TestClient, settings: Settings) -> str:
    engine = make_engine(settings.database_url)
    job_id = create(make_sessions(engine)).id
    engine.dispose()
    return job_id


def test_every_route_that_can_be_read_takes_it(client: TestClient, job_id: str) -> None:
    paths = [path for path, methods in client.get("/openapi.json").json()["paths"].items() if "get" in methods]
    assert "/jobs/{job_id}/events" in paths
    for path in [*paths, "/openapi.json", "/docs", "/jobs?limt=1", "/nothing"]:
        url = path.format(job_id=job_id, artifact_id="00000000-none")
        if path.endswith("/stream"):
            continue  # does not end while the job goes on; see below
        head, get = client.head(url), client.get(url)
        assert (head.status_code, head.content) == (get.status_code, b""), url
        assert {name for name in head.headers if name not in VARYING} == {name for name in get.headers if name not in VARYING}


def test_the_length_is_that_of_the_body_which_is_not_sent(client: TestClient, job_id: str) -> None:
    assert client.head(f"/jobs/{job_id}").headers["content-length"] == client.get(f"/jobs/{job_id}").headers["content-length"]


def test_it_is_measured_as_what_it_is(client: TestClient, job_id: str) -> None:
    client.head(f"/jobs/{job_id}")
    assert 'cliprd_request_seconds_count{method="HEAD",route="/jobs/{job_id}",status="200"} 1.0' in client.get("/metrics").text


@pytest.mark.parametrize("path", ["events", "log", "metrics/stream"])
def test_a_stream_ends_after_its_header(client: TestClient, job_id: str, path: str) -> None:
    response = client.head(f"/jobs/{job_id}/{path}", headers={"Accept": "text/event-stream"})
    assert (response.status_code, response.content) == (200, b"")
    assert response.headers["content-type"].startswith("text/event-stream")


def test_what_can_not_be_read_can_not_be_asked_about(client: TestClient, job_id: str) -> None:
    response = client.head(f"/jobs/{job_id}/cancel")
    assert (response.status_code, response.headers["allow"]) == (405, "POST")
