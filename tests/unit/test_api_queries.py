"""Query parameters that a route doesn't have, or has once only, are refused: on every route."""

from __future__ import annotations

from typing import Any

import httpx2
import pytest
from fastapi.testclient import TestClient

ID = "00000000-none"


def refused(response: httpx2.Response) -> dict[str, dict[str, Any]]:
    """The problems by field."""
    assert response.status_code == 422, response.text
    assert response.headers["content-type"] == "application/problem+json"
    assert response.json()["type"] == "urn:cliprd:problem:invalid-request"
    return {one["field"]: one for one in response.json()["errors"]}


def test_every_route_refuses_what_it_does_not_list_and_documents_it(client: TestClient) -> None:
    operations = [(path, method) for path, methods in client.get("/openapi.json").json()["paths"].items() for method in methods]
    others = [("/openapi.json", "get"), ("/docs", "get"), ("/docs/start.js", "get"), ("/artifacts/{artifact_id}", "head")]
    for path, method in operations + others:
        href = path.format(job_id=ID, artifact_id=ID, key=ID)
        response = client.request(method, href, params={"pretty": 1}, json={} if method == "post" else None)
        if method == "head":
            assert response.status_code == 422
        else:
            assert refused(response)["pretty"]["problem"] == "there is no such query parameter", (method, path)
    for path, method in operations:
        assert "unknown" in client.app.openapi()["paths"][path][method]["responses"]["422"]["description"]  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("query", "remedies"),
    [
        ("limt=3", {"limt": "Did you mean `limit`? Otherwise remove it."}),
        ("status=queued&label=a=b", {"status": "Did you mean `state`? Otherwise remove it."}),
        ("q", {"q": "Remove it. The parameters here are: state, label, limit, cursor."}),
        ("limit=1&limit=1&state=queued&state=failed", {"limit": "Give it once.", "state": "Give it once."}),
        ("limit=1&limit=2&cursr=", {"limit": "Give it once.", "cursr": "Did you mean `cursor`? Otherwise remove it."}),
    ],
)
def test_the_remedy_names_what_was_probably_meant(client: TestClient, query: str, remedies: dict[str, str]) -> None:
    problems = refused(client.get(f"/jobs?{query}"))
    assert {field: one["remedy"] for field, one in problems.items()} == remedies


def test_lists_may_be_repeated_and_parameters_left_out(client: TestClient) -> None:
    assert client.get("/jobs?label=a=1&label=b=2&limit=3&state=queued").status_code == 200
    assert client.get("/jobs?").status_code == 200


def test_a_route_without_parameters_says_so(client: TestClient) -> None:
    assert refused(client.get("/healthz?verbose"))["verbose"]["remedy"] == "Remove it; there are none here."


def test_no_job_is_made_or_changed_by_a_misspelt_dry_run(client: TestClient) -> None:
    assert "dry_run" in refused(client.post("/jobs?dryrun=true", json={}))["dryrun"]["remedy"]


def test_of_very_many_the_first_are_named(client: TestClient) -> None:
    query = "&".join(f"{'long' * 30}{number}=1" for number in range(100))
    fields = [one["field"] for one in client.get(f"/jobs?{query}").json()["errors"]]
    assert len(fields) == 20
    assert all(len(field) <= 80 for field in fields)


def test_names_are_counted_however_they_are_separated(client: TestClient) -> None:
    for path in ("metrics", "metrics/stream"):
        problems = refused(client.get(f"/jobs/{ID}/{path}", params={"names": ",".join(["a"] * 257)}))
        assert problems["names"]["problem"] == "holds 257 names"
        assert "256 at most" in problems["names"]["remedy"]
        assert client.get(f"/jobs/{ID}/{path}", params={"names": ",".join(["a"] * 256)}).status_code == 404
