"""Who is let in: without keys this machine alone, with keys whoever has one of the right scope."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import httpx
import httpx2
import pytest
from fastapi.testclient import TestClient
from sqlalchemy import text
from typer.testing import CliRunner

from service.__main__ import main
from service.app import create_app
from service.auth import is_loopback
from service.cli import app as cli
from service.client import Client
from service.settings import Settings
from tests.store_helpers import spec_dict, write_table

pytestmark = pytest.mark.usefixtures("patient_readiness")


def run(settings: Settings, *arguments: str) -> tuple[int, str, str]:
    result = CliRunner(env={"CLIPRD_DATABASE_URL": settings.database_url, "COLUMNS": "200"}).invoke(cli, ["keys", *arguments])
    return result.exit_code, result.stdout, result.stderr


def make_key(settings: Settings, scope: str) -> str:
    code, stdout, stderr = run(settings, "create", "--scope", scope, "--name", f"{scope} key")
    assert code == 0, stderr
    assert "shown this once" in stderr
    return stdout.strip()


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def problem(response: httpx2.Response, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    assert response.headers["www-authenticate"].startswith("Bearer")
    body: dict[str, Any] = response.json()
    assert "cliprd keys create" in body["detail"] or "scope" in body["detail"]
    return body


@pytest.mark.parametrize(
    ("client_host", "headers"),
    [
        ("192.0.2.7", {}),
        ("127.0.0.1", {"Host": "evil.example"}),
        ("127.0.0.1", {"Host": "127.0.0.1.evil.example:8000"}),
        ("127.0.0.1", {"Host": "[::1"}),
        ("127.0.0.1", {"Host": ""}),
        ("127.0.0.1", {"Origin": "https://evil.example"}),
        ("127.0.0.1", {"Origin": "null"}),
    ],
)
def test_without_keys_other_machines_and_other_sites_pages_are_refused(
    settings: Settings, client_host: str, headers: dict[str, str]
) -> None:
    with TestClient(create_app(settings), base_url="http://127.0.0.1:8000", client=(client_host, 5)) as client:
        for response in (client.get("/jobs", headers=headers), client.post("/jobs/00000000/cancel", headers=headers)):
            assert "no API key has been made" in problem(response, 403)["detail"]
        assert client.get("/healthz", headers=headers).status_code == 200
        assert client.get("/readyz", headers=headers).status_code == 200


def test_where_keys_are_always_needed_this_machine_is_refused_too_and_told_how_to_make_one(settings: Settings) -> None:
    strict = settings.model_copy(update={"always_need_key": True})
    with TestClient(create_app(strict), base_url="http://127.0.0.1:8000", client=("127.0.0.1", 5)) as client:
        for headers in ({}, bearer("cliprd_made_up")):
            detail = problem(client.get("/jobs", headers=headers), 401)["detail"]
            assert "no API key has been made yet" in detail
            assert "in its container" in detail
        assert client.get("/readyz").status_code == 200
        key = make_key(settings, "read")
        assert client.get("/jobs", headers=bearer(key)).status_code == 200
        problem(client.get("/jobs"), 401)


@pytest.mark.parametrize(("client_host", "host"), [("127.0.0.1", "localhost:8000"), ("::1", "[::1]:8000"), ("127.3.4.5", "LOCALHOST")])
def test_without_keys_this_machine_is_let_in(settings: Settings, client_host: str, host: str) -> None:
    with TestClient(create_app(settings), client=(client_host, 5)) as client:
        assert client.get("/jobs", headers={"Host": host, "Origin": f"http://{host}"}).status_code == 200


def test_each_scope_allows_what_it_says_and_what_is_below(client: TestClient, settings: Settings, tmp_path: Path) -> None:
    write_table(tmp_path)
    keys = {scope: bearer(make_key(settings, scope)) for scope in ("read", "submit", "admin")}
    assert "was revoked" in problem(client.get("/jobs", headers=bearer("cliprd_wrong")), 401)["detail"]
    for path in ("/openapi.json", "/docs", "/docs/start.js"):
        assert client.get(path).status_code == 200
    for path in ("/jobs", "/metrics", "/docs/nothing", "/nothing"):
        problem(client.get(path), 401)
        problem(client.get(path, headers={"Authorization": "Basic eDp5"}), 401)
        for headers in keys.values():
            assert client.get(path, headers=headers).status_code == (404 if "nothing" in path else 200)
    refused = client.post("/jobs", content=b"not looked at", headers=keys["read"])
    assert "`read key` has `read`" in problem(refused, 403)["detail"]
    assert 'scope="submit"' in refused.headers["www-authenticate"]
    for scope in ("submit", "admin"):
        response = client.post("/jobs", json=spec_dict(), headers=keys[scope])
        assert response.status_code == 201
    href = f"/jobs/{response.json()['id']}"
    problem(client.post(f"{href}/cancel", headers=keys["read"]), 403)
    assert client.post(f"{href}/cancel", headers=keys["submit"]).status_code == 200
    problem(client.delete(href, headers=keys["submit"]), 403)
    assert client.delete(href, headers=keys["admin"]).status_code == 204
    assert client.get("/healthz").status_code == 200


def test_requests_of_one_moment_are_each_let_in_or_refused_by_their_own_key(client: TestClient, settings: Settings) -> None:
    revoked = make_key(settings, "admin")
    assert run(settings, "revoke", run(settings, "list")[1].splitlines()[1].split()[0])[0] == 0
    expected = {bearer(make_key(settings, "read"))["Authorization"]: 403, bearer(make_key(settings, "submit"))["Authorization"]: 404}
    expected |= {bearer(revoked)["Authorization"]: 401, bearer("cliprd_unknown")["Authorization"]: 401, "": 401}
    sent = [authorization for _ in range(20) for authorization in expected]

    async def all_at_once() -> list[int]:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(client.app), base_url="http://127.0.0.1") as asynchronous:
            requests = [asynchronous.post("/jobs/00000000-none/pause", headers={"Authorization": one} if one else {}) for one in sent]
            return [response.status_code for response in await asyncio.gather(*requests)]

    assert asyncio.run(all_at_once()) == [expected[authorization] for authorization in sent]


def test_keys_are_listed_with_their_use_and_revoked(client: TestClient, settings: Settings) -> None:
    key = make_key(settings, "read")
    listed = run(settings, "list")[1]
    assert "never" in listed
    assert key not in listed
    key_id = listed.splitlines()[1].split()[0]
    assert client.get("/jobs", headers=bearer(key)).status_code == 200
    assert "never" not in run(settings, "list")[1]
    assert run(settings, "revoke", key_id)[:2] == (0, "revoked: read key\n")
    assert "revoked" in run(settings, "list")[1]
    problem(client.get("/jobs", headers=bearer(key)), 401)
    problem(client.get("/jobs"), 401)  # revoking the last key opens nothing
    code, _, stderr = run(settings, "revoke", "nothing")
    assert code == 1
    assert "keys list" in stderr


def test_the_client_sends_the_key_of_the_environment(client: TestClient, settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    import httpx

    key = make_key(settings, "read")
    sent: list[str | None] = []

    def answer(request: httpx.Request) -> httpx.Response:
        sent.append(request.headers.get("Authorization"))
        return httpx.Response(200, content=client.get("/jobs", headers=dict(request.headers)).content)

    transport = httpx.MockTransport(answer)
    monkeypatch.setenv("CLIPRD_API_KEY", key)
    for options in ({}, {"api_key": key}):
        with Client("http://127.0.0.1", transport=transport, **options) as ours:  # type: ignore[arg-type]
            assert list(ours.jobs()) == []
    assert sent == [f"Bearer {key}"] * 2


def test_a_database_that_fails_is_a_503_here_too(client: TestClient) -> None:
    with client.app.state.services.engine.begin() as connection:  # type: ignore[attr-defined]
        connection.execute(text("DROP TABLE api_keys"))
    assert client.get("/jobs").status_code == 503


def test_openapi_says_which_routes_need_a_key(client: TestClient) -> None:
    schema = client.get("/openapi.json").json()
    assert schema["components"]["securitySchemes"]["key"]["scheme"] == "bearer"
    for path, methods in schema["paths"].items():
        for operation in methods.values():
            is_open = path in ("/healthz", "/readyz")
            assert ("security" in operation, {"401", "403"} <= set(operation["responses"])) == (not is_open, not is_open)


def test_an_address_for_other_machines_needs_a_key_first(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[tuple[str, int]] = []
    monkeypatch.setattr("uvicorn.run", lambda _app, **options: started.append((options["host"], options["port"])))
    monkeypatch.setenv("CLIPRD_DATABASE_URL", settings.database_url)
    monkeypatch.setenv("CLIPRD_HOST", "0.0.0.0")
    with pytest.raises(SystemExit, match="keys create"):
        main()
    assert started == []
    make_key(settings, "admin")
    main()
    assert started == [("0.0.0.0", 8000)]


def test_an_address_for_other_machines_is_fine_where_keys_are_always_needed(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[str] = []
    monkeypatch.setattr("uvicorn.run", lambda _app, **options: started.append(options["host"]))
    monkeypatch.setenv("CLIPRD_DATABASE_URL", settings.database_url)
    monkeypatch.setenv("CLIPRD_HOST", "0.0.0.0")
    monkeypatch.setenv("CLIPRD_ALWAYS_NEED_KEY", "true")
    main()
    assert started == ["0.0.0.0"]


def test_this_machine_needs_no_key(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[tuple[str, int]] = []
    monkeypatch.setattr("uvicorn.run", lambda _app, **options: started.append((options["host"], options["port"])))
    monkeypatch.setenv("CLIPRD_DATABASE_URL", settings.database_url)
    main()
    assert started == [("127.0.0.1", 8000)]


@pytest.mark.parametrize(
    ("host", "expected"), [("127.0.0.1", True), ("::1", True), ("localhost.", True), ("0.0.0.0", False), ("::", False)]
)
def test_loopback(host: str, expected: bool) -> None:
    assert is_loopback(host) is expected


def test_options_without_a_name_are_refused(settings: Settings) -> None:
    assert run(settings, "create", "--scope", "read", "--name", "")[0] == 1
    assert run(settings, "create", "--scope", "root", "--name", "x")[0] == 2


def test_migrate_makes_a_database_ready(settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "url").write_text(f"{settings.database_url}\n")
    monkeypatch.setenv("CLIPRD_DATABASE_URL_FILE", str(tmp_path / "url"))
    result = CliRunner().invoke(cli, ["migrate"])
    assert (result.exit_code, result.stdout) == (0, "The database has the newest schema.\n")
    without_migrating = settings.model_copy(update={"migrate_on_start": False})
    with TestClient(create_app(without_migrating), base_url="http://127.0.0.1:8000", client=("127.0.0.1", 5)) as client:
        assert client.get("/readyz").status_code == 200
        assert client.get("/jobs").status_code == 200


def test_a_database_that_cannot_be_used_is_one_line(tmp_path: Path) -> None:
    result = CliRunner(env={"CLIPRD_DATABASE_URL_FILE": str(tmp_path / "missing"), "COLUMNS": "200"}).invoke(cli, ["migrate"])
    assert result.exit_code == 1
    assert "CLIPRD_DATABASE_URL_FILE" in result.stderr
    assert len(result.stderr.splitlines()) == 1
