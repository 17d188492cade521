"""Health and readiness, settings, and what happens when the app is built."""

from __future__ import annotations

from contextlib import ExitStack, suppress
from pathlib import Path

import anyio
import httpx
import pytest
from fastapi.testclient import TestClient
from sqlalchemy.exc import TimeoutError

from service.app import create_app
from service.settings import Settings
from service.store import session
from tests.store_helpers import local_client

pytestmark = pytest.mark.usefixtures("patient_readiness")


def not_ready(settings: Settings) -> dict[str, str]:
    with local_client(create_app(settings)) as client:
        assert client.get("/healthz").json() == {"status": "ok"}
        response = client.get("/readyz")
    assert response.status_code == 503
    assert response.headers["content-type"] == "application/problem+json"
    return {error["field"]: error["problem"] for error in response.json()["errors"]}


def test_ready(client: TestClient) -> None:
    assert client.get("/healthz").json() == {"status": "ok"}
    response = client.get("/readyz")
    assert (response.status_code, response.json()) == (200, {"status": "ready"})


def test_a_database_without_this_schema_is_not_ready(settings: Settings) -> None:
    broken = not_ready(settings.model_copy(update={"migrate_on_start": False}))
    assert list(broken) == ["database"]
    assert "CLIPRD_MIGRATE_ON_START" in broken["database"]


def test_a_broker_that_is_down_is_not_ready(settings: Settings) -> None:
    assert list(not_ready(settings.model_copy(update={"broker_url": "redis://127.0.0.1:1/0"}))) == ["broker"]


def test_an_artifact_store_that_can_not_be_written_is_not_ready(settings: Settings, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert list(not_ready(settings.model_copy(update={"artifacts_root": tmp_path / "file"}))) == ["artifacts_root"]


def test_everything_that_is_wrong_is_named(settings: Settings, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    changes = {"migrate_on_start": False, "broker_url": "redis://127.0.0.1:1/0", "artifacts_root": tmp_path / "file"}
    assert list(not_ready(settings.model_copy(update=changes))) == ["database", "broker", "artifacts_root"]


def test_settings_come_from_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CLIPRD_DATABASE_URL", f"sqlite:///{tmp_path / 'here.db'}")
    monkeypatch.setenv("CLIPRD_BROKER_URL", "memory://")
    monkeypatch.setenv("CLIPRD_ARTIFACTS_ROOT", str(tmp_path / "artifacts"))
    monkeypatch.setenv("CLIPRD_CHECK_FILES", "false")
    app = create_app()
    assert not app.state.services.settings.check_files
    assert list(tmp_path.iterdir()) == []  # nothing is made before the app starts
    with local_client(app) as client:
        assert client.get("/readyz").status_code == 200
    assert (tmp_path / "here.db").is_file()


def test_the_process_is_up_while_all_its_threads_wait(settings: Settings) -> None:
    async def answer() -> int:
        limiter = anyio.to_thread.current_default_thread_limiter()
        limiter.total_tokens = 1
        limiter.acquire_on_behalf_of_nowait("a request that waits")
        async with httpx.AsyncClient(transport=httpx.ASGITransport(create_app(settings)), base_url="http://127.0.0.1") as client:
            with anyio.fail_after(60):
                return (await client.get("/healthz")).status_code

    assert anyio.run(answer) == 200


@pytest.mark.parametrize("path", ["/jobs", "/metrics"])  # the one already waits for a connection to look at the request's key
def test_a_request_that_gets_no_connection_is_told_to_come_back(settings: Settings, monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    monkeypatch.setattr(session, "POOL_TIMEOUT_SECONDS", 0.1)
    app = create_app(settings.model_copy(update={"metrics_need_key": False}))
    with local_client(app) as client, ExitStack() as held:
        with suppress(TimeoutError):
            while True:
                held.enter_context(app.state.services.engine.connect())
        refused = client.get(path)
        assert (refused.status_code, refused.json()["type"]) == (503, "urn:cliprd:problem:database-unavailable")
        assert int(refused.headers["retry-after"]) > 0
        held.close()
        assert client.get(path).status_code == 200
    documented = app.openapi()["paths"][path]["get"]["responses"]["503"]
    assert "Retry-After" in documented["headers"]
    assert "application/problem+json" in documented["content"]
