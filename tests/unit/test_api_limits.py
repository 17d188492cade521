"""Everything a request can make long or large has a limit, and beyond it an answer that says so.

Whole bodies are in test_api_errors, open streams in test_api_streams.
"""

from __future__ import annotations

import asyncio
import base64
import json
from pathlib import Path
from typing import Any

import httpx2
import pytest
from fastapi.testclient import TestClient
from starlette.types import Message, Receive, Scope, Send

from cliprd_core.spec_model import MAX_COUNT, MAX_LIST_LENGTH
from service.middleware import RequestLimits
from service.settings import Settings
from service.store import artifacts
from service.store.blobs import BlobStore
from service.store.kinds import ArtifactKind
from service.store.metrics import record_evaluations
from service.store.session import make_engine, make_sessions
from tests.store_helpers import claim, create, evaluated, spec_dict, write_table

PAGED = ["/jobs", "/artifacts", "/jobs/{job_id}/artifacts"]


@pytest.fixture
def job_id(client: TestClient, settings: Settings, tmp_path: Path) -> str:
    """A running job with two artifacts, beside another job."""
    engine = make_engine(settings.database_url)
    sessions = make_sessions(engine)
    create(sessions)
    claimed = claim(sessions, create(sessions).id)
    (tmp_path / "source").write_bytes(b"weights")
    blob = BlobStore(settings.artifacts_root).put_file(tmp_path / "source")
    with sessions.begin() as session:
        held: dict[str, Any] = {"session": session, "job_id": claimed.job.id, "lease_token": claimed.lease_token}
        for name in ("a", "b"):
            artifacts.register_artifacts(**held, kind=ArtifactKind.MODEL, group="export", files={name: blob})
        record_evaluations(**held, records=[evaluated(10), evaluated(20)])
    engine.dispose()
    return claimed.job.id


def refused_fields(response: httpx2.Response) -> list[str]:
    assert response.status_code == 422, response.text
    assert response.headers["content-type"] == "application/problem+json"
    assert all(one["remedy"] for one in response.json()["errors"])
    return [one["field"] for one in response.json()["errors"]]


def encoded(*parts: Any) -> str:
    return base64.urlsafe_b64encode(json.dumps(parts).encode()).decode().rstrip("=")


def test_long_urls_and_header_fields_are_refused(client: TestClient, settings: Settings) -> None:
    limit = settings.max_header_bytes
    for arguments in (
        {"headers": {"X-Long": "a" * limit}},
        {"headers": {f"X-{n}": "a" * 1000 for n in range(40)}},
        {"params": {"a": "a" * limit}},
    ):
        response = client.get("/jobs", **arguments)  # type: ignore[arg-type]
        assert response.status_code == 431
        assert response.headers["content-type"] == "application/problem+json"
        assert str(limit) in response.json()["detail"]
    assert client.get("/jobs", headers={"X-Long": "a" * (limit - 1000)}).status_code == 200


@pytest.mark.parametrize("path", PAGED)
def test_pages_follow_each_other_and_every_misuse_of_a_cursor_is_refused(client: TestClient, job_id: str, path: str) -> None:
    url = path.format(job_id=job_id)
    first = client.get(url, params={"limit": 1}).json()
    cursor = first["next_cursor"]
    second = client.get(url, params={"limit": 1, "cursor": cursor}).json()
    assert second["next_cursor"] is None
    kind, time, row_id = json.loads(base64.urlsafe_b64decode(cursor + "=="))
    others = [other.format(job_id=job_id) for other in PAGED if ("artifacts" in other) != ("artifacts" in path)]
    misused = [client.get(other, params={"limit": 1}).json()["next_cursor"] for other in others]
    misused += ["", "x", cursor[:-4], cursor[4:], cursor.upper(), f"{cursor}!", "A" * 513]
    misused += [
        encoded(kind, time),
        encoded(kind, row_id, time),
        encoded(kind, time, 7),
        encoded(kind, None, row_id),
        encoded(time, row_id),
    ]
    misused += [encoded(kind, "2026-01-01T00:00:00", row_id), encoded(kind, time, "a\0b")]
    misused += [encoded(kind, "0001-01-01T00:00:00+14:00", row_id), encoded(kind, "9999-12-31T23:59:59-14:00", row_id)]
    for given in misused:
        assert refused_fields(client.get(url, params={"cursor": given})) == ["cursor"], given


def test_evaluations_come_in_pages_by_step(client: TestClient, job_id: str) -> None:
    url = f"/jobs/{job_id}/evaluations"
    first = client.get(url, params={"limit": 1}).json()
    cursor = first["next_cursor"]
    second = client.get(url, params={"limit": 1, "cursor": cursor}).json()
    assert [one["step"] for page in (first, second) for one in page["evaluations"]] == [10, 20]
    assert second["next_cursor"] is None
    _, step, task, dataset = json.loads(base64.urlsafe_b64decode(cursor + "=="))
    misused = [client.get(path.format(job_id=job_id), params={"limit": 1}).json()["next_cursor"] for path in PAGED]
    misused += ["", "x", cursor[:-4], encoded("Evaluation", str(step), task, dataset), encoded("Evaluation", True, task, dataset)]
    misused += [
        encoded("Evaluation", place, task, name) for place, name in ((-1, dataset), (2**63, dataset), (step, "\0"), (step, "\ud800"))
    ]
    for given in misused:
        assert refused_fields(client.get(url, params={"cursor": given})) == ["cursor"], given


@pytest.mark.parametrize(
    ("path", "parameter", "too_much"),
    [
        ("/jobs/{job_id}/evaluations", "limit", 1001),
        *((path, "limit", value) for path in PAGED for value in (0, 201)),
        ("/jobs/{job_id}/events", "limit", 1001),
        ("/jobs/{job_id}/events", "after", 2**63),
        ("/jobs/{job_id}/metrics", "max_points", 10_001),
        ("/jobs/{job_id}/metrics", "since_step", 2**63),
        ("/jobs/{job_id}/metrics", "names", ["a"] * 257),
        ("/jobs/{job_id}/metrics/stream", "names", ["a"] * 257),
        ("/jobs/{job_id}/log", "tail", 100_001),
        ("/jobs", "label", ["a=b"] * 17),
    ],
)
def test_lists_end_somewhere(client: TestClient, job_id: str, path: str, parameter: str, too_much: Any) -> None:
    assert refused_fields(client.get(path.format(job_id=job_id), params={parameter: too_much})) == [parameter]


@pytest.mark.parametrize(
    ("field", "changes"),
    [
        ("name", {"name": "a" * 129}),
        ("labels", {"labels": {f"a{number}": "" for number in range(65)}}),
        ("labels.a", {"labels": {"a": "b" * 129}}),
        ("data.train", {"data": {"train": [{"type": "csv", "path": "pairs.tsv"}] * (MAX_LIST_LENGTH + 1)}}),
        ("data.train.0.path", {"data": {"train": [{"type": "csv", "path": "a" * 4097}]}}),
        ("data.train.0.shards", {"data": {"train": [{"type": "webdataset", "shards": "{000000..100000}.tar"}]}}),
        ("data.train.0.num_samples", {"data": {"train": [{"type": "csv", "path": "pairs.tsv", "num_samples": MAX_COUNT + 1}]}}),
        ("teachers", {"recipe": "clip_kd", "teachers": [{"job": "00000000"}] * 9}),
        (
            "evaluation.zero_shot",
            {"evaluation": {"zero_shot": [{"path": "a", "name": f"{number}"} for number in range(MAX_LIST_LENGTH + 1)]}},
        ),
        ("evaluation.every_epochs", {"evaluation": {"every_epochs": 10_001}}),
        ("training.warmup_steps", {"training": {"warmup_steps": 10**4000}}),
        ("training.checkpoint_every_steps", {"training": {"checkpoint_every_steps": MAX_COUNT + 1}}),
        ("training.log_every_steps", {"training": {"log_every_steps": MAX_COUNT + 1}}),
        ("training.micro_batch_size", {"training": {"micro_batch_size": 2_000_000}}),
        ("resources.max_hours", {"resources": {"max_hours": 1e300}}),
    ],
)
def test_parts_of_a_spec_end_somewhere(client: TestClient, tmp_path: Path, field: str, changes: dict[str, Any]) -> None:
    write_table(tmp_path)
    assert refused_fields(client.post("/jobs", json=spec_dict(**changes))) == [field]


@pytest.mark.parametrize(
    ("field", "labels"),
    [
        ("labels", {f"a{number}": "" for number in range(17)}),
        ("labels", {}),
        ("labels.a", {"a": "\0"}),
        ("labels.a", {"a": "b" * 129}),
        ("labels.\0", {"\0": "a"}),
    ],
)
def test_the_labels_of_jobs_to_cancel_are_labels_of_specs(client: TestClient, field: str, labels: dict[str, str]) -> None:
    assert refused_fields(client.post("/jobs/cancel", json={"labels": labels})) == [field]


def test_a_long_body_ends_a_stream_whose_answer_has_begun() -> None:
    heard: list[str] = []

    async def stream(_scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        while not heard or heard[-1] == "http.request":
            heard.append((await receive())["type"])

    async def chunk() -> Message:
        return {"type": "http.request", "body": bytes(8), "more_body": True}

    async def ignore(_: Message) -> None:
        return

    scope = {"type": "http", "method": "GET", "path": "/", "raw_path": b"/", "query_string": b"", "headers": []}
    asyncio.run(RequestLimits(stream, max_body_bytes=10, max_header_bytes=1000)(scope, chunk, ignore))
    assert heard == ["http.request", "http.disconnect"]
