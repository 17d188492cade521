"""Every error is a problem (RFC 9457), and names the field, what is wrong with it, and what to do."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from fastapi.testclient import TestClient
from sqlalchemy import text

from service.app import create_app
from service.settings import Settings
from tests.store_helpers import TINY_CONFIG, local_client, spec_dict, write_table

JSON = {"content-type": "application/json"}


def problem(response: httpx2.Response, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    body: dict[str, Any] = response.json()
    assert {"type", "title", "status", "detail", "instance", "errors"} == set(body)
    return body


def test_every_field_of_a_bad_spec_is_named(client: TestClient) -> None:
    spec = spec_dict(training={"epoch": 1, "global_batch_size": "many"}, data={"train": [{"type": "webdataset"}]})
    body = problem(client.post("/jobs", json=spec), 422)
    assert body["type"] == "urn:cliprd:problem:invalid-request"
    by_field = {error["field"]: error for error in body["errors"]}
    assert set(by_field) == {"training.epoch", "training.global_batch_size", "data.train.0.shards"}
    assert "`training.epochs`" in by_field["training.epoch"]["remedy"]
    assert all(error["problem"] and error["remedy"] for error in body["errors"])


def test_what_only_the_files_tell_is_named_too(client: TestClient, tmp_path: Path) -> None:
    body = problem(client.post("/jobs", json=spec_dict()), 422)
    assert [error["field"] for error in body["errors"]] == ["data.train.0.path"]
    write_table(tmp_path)
    assert client.post("/jobs", json=spec_dict()).status_code == 201


def test_malformed_json_is_answered_with_its_position(client: TestClient) -> None:
    body = problem(client.post("/jobs", content=b'{\n  "name": oops}', headers=JSON), 400)
    assert "line 2, column 11" in body["detail"]


@pytest.mark.parametrize(
    ("content", "headers", "status"),
    [
        (b"", JSON, 422),
        (b"null", JSON, 422),
        (b"[]", JSON, 422),
        (b'"text"', JSON, 422),
        (b'{"name": "x"}', {"content-type": "text/plain"}, 422),
        (b"[" * 100_000, JSON, 400),
        (b'{"a":' * 100_000, JSON, 400),
        (b"\xff\xfe{", JSON, 400),
        (b'{"\\ud800": 1}', JSON, 422),
        (b'{"labels": {"\\ud800": "\\ud800"}, "name": "\\ud800"}', JSON, 422),
        (b"9" * 5000, JSON, 400),
    ],
)
def test_bodies_that_are_no_spec(client: TestClient, content: bytes, headers: dict[str, str], status: int) -> None:
    problem(client.post("/jobs", content=content, headers=headers), status)


@pytest.mark.parametrize("value", ["NaN", "Infinity", '"\\u0000"', '"\\ud800"', "1e999", "[" * 400 + "]" * 400])
def test_values_that_can_not_be_stored_are_refused(client: TestClient, tmp_path: Path, value: str) -> None:
    write_table(tmp_path)
    spec = json.dumps(spec_dict(student={"config": {**TINY_CONFIG, "extra": "HERE"}})).replace('"HERE"', value)
    body = problem(client.post("/jobs", content=spec, headers=JSON), 422)
    assert body["errors"][0]["field"].startswith("student.config.extra")


def test_unknown_paths_and_methods(client: TestClient) -> None:
    assert "/nothing" in problem(client.get("/nothing"), 404)["detail"]
    response = client.put("/jobs")
    assert "GET, HEAD, POST" in problem(response, 405)["detail"]
    assert response.headers["allow"] == "GET, HEAD, POST"


@pytest.mark.parametrize("method", ["GET", "POST", "DELETE"])
def test_an_empty_id_is_no_list(client: TestClient, method: str) -> None:
    """As from `/jobs/$ID` where the shell knows no such variable."""
    problem(client.request(method, "/jobs/", follow_redirects=False), 404)


@pytest.mark.parametrize(
    ("sent", "said"),
    [
        ({}, "is missing"),
        ({"content": b'{"name": "x"}'}, "was not sent as JSON"),
        ({"content": b"name: x", "headers": {"content-type": "application/x-yaml"}}, "was not sent as JSON"),
        ({"data": {"name": "x"}}, "was not sent as JSON"),
    ],
)
def test_a_body_of_another_type_is_told_how_it_is_sent(client: TestClient, sent: dict[str, Any], said: str) -> None:
    for path in ("/jobs", "/jobs/cancel"):
        (error,) = problem(client.post(path, **sent), 422)["errors"]
        assert (error["field"], said in error["problem"]) == ("body", True)
        assert "Content-Type: application/json" in error["remedy"]
    if sent:
        (error,) = problem(client.post("/jobs/00000000-none/clone", **sent), 422)["errors"]
        assert (error["field"], error["problem"]) == ("body", "must be a JSON object, but was not sent as JSON")


def test_a_long_body_is_refused_whether_its_length_is_announced_or_not(client: TestClient, settings: Settings) -> None:
    body = b" " * (settings.max_body_bytes + 1)
    assert str(settings.max_body_bytes) in problem(client.post("/jobs", content=body, headers=JSON), 413)["detail"]

    def chunks() -> Iterator[bytes]:
        for _ in range(11):
            yield b" " * (settings.max_body_bytes // 10)

    response = client.post("/jobs", content=chunks(), headers=JSON)
    assert "content-length" not in response.request.headers
    assert str(settings.max_body_bytes) in problem(response, 413)["detail"]


def test_a_fault_of_ours_is_a_problem_without_its_inner_workings(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(**_: Any) -> None:
        raise RuntimeError("secret detail")

    monkeypatch.setattr("service.store.jobs.list_jobs", broken)
    response = client.get("/jobs")
    problem(response, 500)
    assert "secret" not in response.text


def test_a_database_that_fails_is_a_503(client: TestClient, settings: Settings) -> None:
    with client.app.state.services.engine.begin() as connection:  # type: ignore[attr-defined]
        connection.execute(text("DROP TABLE job_labels"))
        connection.execute(text("DROP TABLE metrics"))
        connection.execute(text("DROP TABLE metric_rollups"))
        connection.execute(text("DROP TABLE evaluations"))
        connection.execute(text("DROP TABLE artifacts"))
        connection.execute(text("DROP TABLE jobs"))
    response = client.get("/jobs")
    problem(response, 503)
    assert response.headers["retry-after"]


def test_openapi_documents_every_error_and_examples(client: TestClient) -> None:
    schema = client.get("/openapi.json").json()
    operations = [(path, method, one) for path, methods in schema["paths"].items() for method, one in methods.items()]
    for path, method, operation in operations:
        if path == "/healthz":
            continue
        errors = {status: answer for status, answer in operation["responses"].items() if status >= "400"}
        assert errors, (path, method)
        for answer in errors.values():
            assert answer["content"] == {"application/problem+json": {"schema": {"$ref": "#/components/schemas/Problem"}}}, (path, method)
        if "{" in path:
            assert "404" in errors
    assert {"201", "400", "413", "422", "500"} <= set(schema["paths"]["/jobs"]["post"]["responses"])
    assert "409" in schema["paths"]["/jobs/{job_id}/cancel"]["post"]["responses"]
    assert "HTTPValidationError" not in schema["components"]["schemas"]
    assert schema["components"]["schemas"]["Problem"]["properties"]["errors"]["items"] == {"$ref": "#/components/schemas/FieldProblem"}
    examples = schema["paths"]["/jobs"]["post"]["requestBody"]["content"]["application/json"]["examples"]
    assert {"quick", "clip", "clip_kd", "clip_rd"} <= set(examples)


def test_a_header_is_told_as_the_reference_spells_it(client: TestClient) -> None:
    paths = client.get("/openapi.json").json()["paths"]
    assert list(paths["/jobs"]["post"]["responses"]["201"]["headers"]) == ["Idempotency-Replayed"]
    operations = [one for methods in paths.values() for one in methods.values()]
    documented = {one["name"] for operation in operations for one in operation.get("parameters", []) if one["in"] == "header"}
    assert documented == {"Idempotency-Key", "Last-Event-ID", "Range", "If-Range", "If-Match", "If-None-Match"}
    for method, path, header in (("POST", "/jobs", "idempotency-key"), ("GET", "/jobs/00000000-none/events", "last-event-id")):
        body = problem(client.request(method, path, json=spec_dict(), headers={header: "a b"}), 422)
        assert [one["field"] for one in body["errors"] if one["field"] in documented] == [header.title().replace("-Id", "-ID")]
        assert header not in body["detail"]


def test_what_is_empty_or_no_number_is_told_plainly(client: TestClient, tmp_path: Path) -> None:
    write_table(tmp_path)
    no_key, no_number = {"Idempotency-Key": ""}, {"Last-Event-ID": "abc"}
    for refused, told, remedy in (
        (client.post("/jobs", json=spec_dict(), headers=no_key), "is empty", "such as a UUID"),
        (client.get("/jobs/00000000-none/log", headers=no_number), "must be a valid integer, but is `abc`", "whole number"),
        (client.post("/jobs/cancel", json={"labels": {}}), "is empty, which would mean every job", '{"labels": {"team": "vision"}}'),
    ):
        [error] = problem(refused, 422)["errors"]
        assert error["problem"] == told
        assert remedy in error["remedy"]


def test_answers_are_linked_to_what_can_be_done_next(client: TestClient) -> None:
    schema = client.get("/openapi.json").json()
    operations = {one["operationId"]: (path, one) for path, methods in schema["paths"].items() for one in methods.values()}
    of_jobs = {name for name, (path, _) in operations.items() if path.startswith("/jobs/{job_id}")}
    for name in ("submit_job", "read_job", "pause_job", "clone_job"):
        answers = [one for status, one in operations[name][1]["responses"].items() if status < "300" and "links" in one]
        assert answers
        assert all(set(one["links"]) == of_jobs for one in answers)
    for link in schema["components"]["links"].values():
        path, operation = operations[link["operationId"]]
        parameters = {one["name"] for one in operation["parameters"]}
        assert set(link["parameters"]) <= parameters
        assert all(name in link["parameters"] for name in parameters if f"{{{name}}}" in path)


def test_the_quick_example_is_accepted_in_a_checkout(settings: Settings) -> None:
    checkout = settings.model_copy(update={"data_root": Path(__file__).parents[2]})
    with local_client(create_app(checkout)) as client:
        examples = client.get("/openapi.json").json()["paths"]["/jobs"]["post"]["requestBody"]["content"]["application/json"]["examples"]
        assert client.post("/jobs", json=examples["quick"]["value"]).status_code == 201


def test_what_the_sound_parts_of_a_bad_spec_name_is_checked_as_well(client: TestClient, tmp_path: Path) -> None:
    write_table(tmp_path)
    spec = spec_dict(
        recipe="clip_kd",
        teachers=[{"model": "ViT-B-61", "pretrained": "openai"}, {"model": "ViT-B-16"}],
        data={"train": [{"type": "csv", "path": "none.tsv"}, {"type": "csv", "path": "pairs.tsv"}, {"type": "zip"}]},
        training={"epochs": "many"},
        evaluation={"zero_shot": ["nowhere"], "retrieval": "nowhere"},
    )
    expected = {
        "teachers.0.model",
        "teachers.1",
        "data.train.0.path",
        "data.train.2.type",
        "training.epochs",
        "evaluation.zero_shot.0.path",
        "evaluation.retrieval",
    }
    for answer in (client.post("/jobs", json=spec), client.post("/jobs", json=spec, params={"dry_run": True})):
        assert {error["field"] for error in problem(answer, 422)["errors"]} == expected


def test_a_clone_is_told_all_problems_too(client: TestClient, tmp_path: Path) -> None:
    write_table(tmp_path)
    job = client.post("/jobs", json=spec_dict()).json()
    overrides = {"student": {"config": None, "model": "ViT-B-61"}, "training": {"epochs": "many"}}
    body = problem(client.post(job["links"]["clone"], json=overrides), 422)
    assert [error["field"] for error in body["errors"]] == ["training.epochs", "student.model"]


def test_only_a_body_that_should_be_a_spec_is_looked_at_as_one(client: TestClient) -> None:
    body = problem(client.post("/jobs/cancel", json={"labels": {}, "student": {"model": "ViT-B-61"}}), 422)
    assert {error["field"] for error in body["errors"]} == {"labels", "student"}
