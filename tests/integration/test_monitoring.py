"""What monitoring sees: counts on SQLite and PostgreSQL, `/metrics`, readiness, and logs as JSON."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi.testclient import TestClient
from prometheus_client.parser import text_string_to_metric_families
from pydantic import SecretStr
from sqlalchemy import Engine, text

from cliprd_core.run_dir import ErrorReason, ErrorRecord
from service import logs, readiness
from service.app import create_app
from service.settings import Settings
from service.store.jobs import (
    Cancelled,
    JobState,
    LeaseLostError,
    delete_job,
    record_metrics,
    release_job,
    request_cancel,
    requeue_expired,
)
from service.store.models import Job
from service.store.session import database_now, is_writable, make_engine, reading
from service.store.statistics import QueueTotals, RunningJob, job_statistics
from tests.store_helpers import FAILURE, Sessions, claim, create, finish, local_client, measured
from worker.cleaner import Cleaner
from worker.holds import Holds
from worker.reaper import Reaper
from worker.settings import WorkerSettings
from worker.webhooks import Messenger


def fill(sessions: Sessions) -> str:
    """A succeeded job, one whose worker vanished and that is queued again since 100 s, and a running one; returns the running one's id."""
    finish(sessions, claim(sessions, create(sessions).id))
    lost, running = (create(sessions) for _ in range(2))
    claim(sessions, lost.id)
    held = claim(sessions, running.id)
    with sessions.begin() as session:
        record_metrics(session=session, job_id=running.id, lease_token=held.lease_token, records=[measured(5)])
        expired = session.get_one(Job, lost.id)
        expired.lease_expires_at = database_now(session) - timedelta(seconds=1)
    with sessions.begin() as session:
        assert len(requeue_expired(session=session).queued) == 1
        queued = session.get_one(Job, lost.id)
        queued.queued_at = database_now(session) - timedelta(seconds=100)
    return running.id


def test_statistics(sessions: Sessions) -> None:
    with reading(sessions) as session:
        assert job_statistics(session=session).num_jobs == {}
    running_id = fill(sessions)
    with reading(sessions) as session:
        found = job_statistics(session=session)
    counts = {JobState.SUCCEEDED: 1, JobState.QUEUED: 1, JobState.RUNNING: 1}
    assert found.num_jobs == {(state, "default"): counts.get(state, 0) for state in JobState}
    oldest = found.queues["default"].oldest_seconds
    assert 100 <= oldest < 130
    assert found.queues == {"default": QueueTotals(num_attempts=3, oldest_seconds=oldest)}
    assert found.running == [RunningJob(running_id, "default", 8.0)]
    assert found.num_expired_leases == 0
    with sessions.begin() as session:
        session.get_one(Job, running_id).lease_expires_at = database_now(session) - timedelta(seconds=1)
    with reading(sessions) as session:
        assert job_statistics(session=session).num_expired_leases == 1


def test_ended_attempts_are_counted_by_how_they_ended_and_stay_counted(sessions: Sessions) -> None:
    def ended() -> dict[str, int]:
        with reading(sessions) as session:
            found = job_statistics(session=session).num_ended
        assert {queue for queue, _ in found} <= {"default"}
        return {outcome: count for (_, outcome), count in found.items() if count}

    assert ended() == {}
    job_ids = [create(sessions).id for _ in range(6)]
    succeeded, diverged, killed, cancelled, released, lost = (claim(sessions, job_id) for job_id in job_ids)
    assert ended() == {}
    finish(sessions, succeeded)
    finish(sessions, diverged, FAILURE)
    finish(sessions, killed, ErrorRecord(reason=ErrorReason.WORKER_LOST, message="SIGKILL"))
    with sessions.begin() as session:
        request_cancel(session=session, job_id=cancelled.job.id)
    finish(sessions, cancelled, Cancelled())
    with sessions.begin() as session:
        release_job(session=session, job_id=released.job.id, lease_token=released.lease_token)
    with sessions.begin() as session:
        assert [job.id for job in requeue_expired(session=session, now=database_now(session) + timedelta(seconds=61)).lost] == [lost.job.id]
    all_ended = dict.fromkeys(("succeeded", "diverged", "worker_lost", "cancelled", "given_back", "lease_lost"), 1)
    assert ended() == all_ended
    with pytest.raises(LeaseLostError):
        finish(sessions, lost)
    assert ended() == all_ended, "whoever lost the lease ends nothing"
    finish(sessions, claim(sessions, lost.job.id))
    with sessions.begin() as session:
        for job_id in (succeeded.job.id, diverged.job.id, cancelled.job.id, lost.job.id):
            delete_job(session=session, job_id=job_id)
    assert ended() == all_ended | {"succeeded": 2}, "deletion takes nothing back"


def test_attempts_that_end_at_once_are_all_counted(sessions: Sessions) -> None:
    claims = [claim(sessions, create(sessions).id) for _ in range(12)]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda claimed: finish(sessions, claimed), claims))
    with reading(sessions) as session:
        assert job_statistics(session=session).num_ended["default", "succeeded"] == 12


def samples(client: TestClient) -> dict[tuple[str, ...], float]:
    response = client.get("/metrics")
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/plain")
    families = text_string_to_metric_families(response.text)
    return {(one.name, *(value for _, value in sorted(one.labels.items()))): one.value for family in families for one in family.samples}


def test_prometheus_reads_jobs_and_latencies(client: TestClient) -> None:
    running_id = fill(client.app.state.services.sessions)  # type: ignore[attr-defined]
    for path in (f"/jobs/{running_id}", f"/jobs/{running_id}", "/jobs/00000000", "/nothing/at/all"):
        client.get(path)
    found = samples(client)
    assert found["cliprd_jobs", "default", "running"] == 1
    assert found["cliprd_jobs", "default", "failed"] == 0
    assert found["cliprd_ended_attempts_total", "lease_lost", "default"] == 1
    assert found["cliprd_ended_attempts_total", "out_of_memory", "default"] == 0
    assert found["cliprd_samples_per_second", running_id, "default"] == 8.0
    assert found["cliprd_queue_age_seconds", "default"] >= 100
    assert found["cliprd_request_seconds_count", "GET", "/jobs/{job_id}", "200"] == 2
    assert found["cliprd_request_seconds_count", "GET", "/jobs/{job_id}", "404"] == 1
    assert found["cliprd_request_seconds_count", "GET", "none", "404"] == 1


def test_metrics_need_a_key_unless_the_settings_say_otherwise(settings: Settings) -> None:
    for needs_key, status in ((True, 403), (False, 200)):
        with TestClient(create_app(settings.model_copy(update={"metrics_need_key": needs_key})), client=("192.0.2.1", 1)) as client:
            assert client.get("/metrics").status_code == status
            assert client.get("/jobs").status_code == 403


@pytest.mark.usefixtures("patient_readiness")
def test_a_database_that_can_only_be_read_is_not_ready(postgres_url: str, settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readiness, "READY_SECONDS", 0.0)
    with local_client(create_app(settings.model_copy(update={"database_url": postgres_url}))) as client:
        assert client.get("/readyz").status_code == 200
        engine = make_engine(postgres_url)
        with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            connection.execute(text(f"ALTER DATABASE {engine.url.database} SET default_transaction_read_only = on"))
        engine.dispose()
        client.app.state.services.engine.dispose()  # type: ignore[attr-defined]  # the setting is for new connections
        (problem,) = client.get("/readyz").json()["errors"]
        assert problem["field"] == "database"
        assert "can only be read" in problem["problem"]


def test_a_usual_database_is_writable(engine: Engine) -> None:
    with engine.connect() as connection:
        assert is_writable(connection)


@pytest.fixture
def json_logs(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    before = caplog.handler.formatter
    caplog.handler.setFormatter(logs.JsonFormatter())
    caplog.set_level(logging.INFO)
    yield caplog
    caplog.handler.setFormatter(before)  # the handler is that of all tests
    logs.clear_job()


def lines(caplog: pytest.LogCaptureFixture) -> list[dict[str, Any]]:
    return [json.loads(line) for line in caplog.text.splitlines()]


def test_json_lines_name_job_and_attempt(json_logs: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger("worker.test")
    logs.set_job("job-1", 2)
    logger.warning('a "quoted"\nline %d', 1)
    logs.clear_job()
    try:
        int("inner")
    except ValueError:
        logger.exception("failed")
    first, second = (line for line in lines(json_logs) if line["logger"] == "worker.test")
    assert first.pop("time").endswith("+00:00")
    assert first == {"level": "warning", "logger": "worker.test", "message": 'a "quoted"\nline 1', "job_id": "job-1", "attempt": 2}
    assert "job_id" not in second
    assert "ValueError: invalid literal" in second["error"]


def test_json_lines_of_the_workers_parent_process_name_job_and_attempt(
    sessions: Sessions, database_url: str, tmp_path: Path, json_logs: pytest.LogCaptureFixture
) -> None:
    """It works on no job itself: it finds lost ones, delivers webhooks, and removes run directories."""

    class NobodyThere(httpx.AsyncBaseTransport):
        async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
            raise httpx.ConnectError("refused", request=request)

    settings = WorkerSettings(
        database_url=database_url,
        broker_url="memory://",
        runs_root=tmp_path / "runs",
        artifacts_root=tmp_path / "artifacts",
        webhook_urls=("https://one/hook",),
        webhook_secret=SecretStr("whsec_" + "c2VjcmV0" * 4),
    )
    lost, deleted = create(sessions), create(sessions)
    with sessions.begin() as session:
        request_cancel(session=session, job_id=deleted.id)
        delete_job(session=session, job_id=deleted.id)
    (settings.runs_root / deleted.id).mkdir(parents=True)
    claim(sessions, lost.id)
    Messenger(settings, settings.webhook_urls[0], NobodyThere()).run_once()
    with sessions.begin() as session:
        session.get_one(Job, lost.id).lease_expires_at = database_now(session) - timedelta(seconds=1)
    reaper = Reaper(settings, Holds())
    reaper.run_once()
    reaper.close()
    Cleaner(settings).run_once()
    found = {line["logger"]: (line.get("job_id"), line.get("attempt")) for line in lines(json_logs)}
    assert found["worker.reaper"] == (lost.id, 1)
    assert found["worker.webhooks"] == (lost.id, 0)
    assert found["worker.run_dirs"] == (deleted.id, None)


def test_a_requests_lines_name_it_and_its_job(client: TestClient, json_logs: pytest.LogCaptureFixture) -> None:
    with client.app.state.services.engine.begin() as connection:  # type: ignore[attr-defined]
        connection.execute(text("DROP TABLE evaluations"))
    job_id = create(client.app.state.services.sessions).id  # type: ignore[attr-defined]
    assert client.get(f"/jobs/{job_id}/evaluations").status_code == 503
    (line,) = [line for line in lines(json_logs) if line["logger"] == "service.errors"]
    assert (line["job_id"], line["request"]) == (job_id, f"GET /jobs/{job_id}/evaluations")


@pytest.mark.parametrize("module", ["service", "worker"])
def test_both_processes_log_json_when_told_to(module: str, tmp_path: Path, settings: Settings) -> None:
    code = {
        "service": "from service.app import create_app\nfrom fastapi.testclient import TestClient\n"
        "with TestClient(create_app()): logging.getLogger('uvicorn.error').warning('hello')",
        "worker": "from worker.celery_app import app\nfrom celery.signals import setup_logging\n"
        "app.log.setup(loglevel='INFO'); logging.getLogger('worker.tasks').warning('hello')",
    }[module]
    environment = {
        "CLIPRD_LOG_FORMAT": "json",
        "CLIPRD_DATABASE_URL": settings.database_url,
        "CLIPRD_BROKER_URL": "memory://",
        "PYTHONPATH": str(Path(__file__).parents[2]),
    }
    done = subprocess.run(
        [sys.executable, "-c", f"import logging\n{code}"], capture_output=True, text=True, cwd=tmp_path, env=environment, check=True
    )
    assert [json.loads(line)["message"] for line in done.stderr.splitlines()][-1] == "hello"
