"""The broker as the service uses it: a real Redis that works, is down, hangs, or comes back."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis
from celery import Celery
from kombu.exceptions import KombuError

from service.app import create_app
from service.queue import RUN_JOB_TASK, JobQueue
from service.settings import Settings
from service.store.session import make_engine, make_sessions
from service.store.transitions import QueuedJob
from tests.store_helpers import local_client, read, spec_dict, write_table

PATIENCE_SECONDS = 60.0
"""With a broker that answers."""
TIMEOUT_SECONDS = 0.5
"""With one that doesn't."""


@pytest.fixture
def queue(redis_url: str) -> Iterator[JobQueue]:
    with redis.Redis.from_url(redis_url) as client:
        client.flushall()
    queue = JobQueue(redis_url, timeout_seconds=PATIENCE_SECONDS)
    yield queue
    queue.close()


@pytest.fixture
def silent_port() -> Iterator[int]:
    """A port that takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0), backlog=50) as server:
        yield server.getsockname()[1]


def received(redis_url: str, queue: str) -> list[tuple[str, list[str]]]:
    """Task names and arguments of the messages in a queue, as a Celery worker would read them."""
    app = Celery(broker=redis_url, set_as_current=False)
    messages = []
    with app.connection_for_read() as connection, connection.SimpleQueue(queue, no_ack=True) as waiting:
        for _ in range(waiting.qsize()):
            message = waiting.get_nowait()
            messages.append((str(message.headers["task"]), message.payload[0]))
    app.close()
    return messages


def test_a_message_holds_the_id_and_nothing_else_and_goes_to_the_jobs_queue(queue: JobQueue, redis_url: str) -> None:
    queue.check()
    assert queue.send([QueuedJob("job-1", "default"), QueuedJob("job-2", "gpu.a100")])
    assert received(redis_url, "default") == [(RUN_JOB_TASK, ["job-1"])]
    assert received(redis_url, "gpu.a100") == [(RUN_JOB_TASK, ["job-2"])]


def test_connections_that_broke_are_made_anew(queue: JobQueue, redis_url: str) -> None:
    assert queue.send([QueuedJob("job-1", "default")])
    with redis.Redis.from_url(redis_url) as client:
        client.client_kill_filter(_type="normal", skipme=True)
    assert queue.send([QueuedJob("job-2", "default")])
    assert received(redis_url, "default") == [(RUN_JOB_TASK, ["job-1"]), (RUN_JOB_TASK, ["job-2"])]


def test_what_kombu_makes_of_a_channel_that_lost_its_connection_is_no_fault_of_the_caller(
    queue: JobQueue, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def put(*_: object, **__: object) -> None:
        raise AttributeError("'NoneType' object has no attribute 'client'")  # as was seen where connections break

    with monkeypatch.context() as patch:
        patch.setattr("kombu.transport.redis.Channel._put", put)
        assert not queue.send([QueuedJob("job-1", "default")])
    assert queue.send([QueuedJob("job-1", "default")])
    assert received(redis_url, "default") == [(RUN_JOB_TASK, ["job-1"])]


@pytest.mark.parametrize("kind", ["refusing", "silent"])
def test_a_broker_that_is_down_is_noticed_soon_and_logged(kind: str, silent_port: int, caplog: pytest.LogCaptureFixture) -> None:
    queue = JobQueue(f"redis://127.0.0.1:{silent_port if kind == 'silent' else 1}/0", timeout_seconds=TIMEOUT_SECONDS)
    started = time.monotonic()
    assert not queue.send([QueuedJob(f"job-{number}", "default") for number in range(200)])
    assert time.monotonic() - started < 100 * TIMEOUT_SECONDS, "it is not asked again for each of the others"
    assert "200 jobs are stored" in caplog.text
    with pytest.raises(KombuError):
        queue.check()
    queue.close()


def test_a_job_is_accepted_while_the_broker_is_down_and_left_to_the_reaper(tmp_path: Path) -> None:
    write_table(tmp_path)
    settings = Settings(
        database_url=f"sqlite:///{tmp_path / 'x.db'}",
        broker_url="redis://127.0.0.1:1/0",
        artifacts_root=tmp_path / "artifacts",
        data_root=tmp_path,
        broker_timeout_seconds=TIMEOUT_SECONDS,
    )
    with local_client(create_app(settings)) as client:
        response = client.post("/jobs", json=spec_dict())
    assert response.status_code == 201
    engine = make_engine(settings.database_url)
    job = read(make_sessions(engine), response.json()["id"])
    assert (job.state, job.sent_at) == ("queued", None)
    engine.dispose()


@pytest.mark.usefixtures("queue", "patient_readiness")
def test_the_api_sends_what_it_stores(redis_url: str, database_url: str, tmp_path: Path) -> None:
    write_table(tmp_path)
    settings = Settings(
        database_url=database_url,
        broker_url=redis_url,
        artifacts_root=tmp_path / "artifacts",
        data_root=tmp_path,
        broker_timeout_seconds=PATIENCE_SECONDS,
    )
    with local_client(create_app(settings)) as client:
        assert client.get("/readyz").status_code == 200
        job = client.post("/jobs", json=spec_dict(resources={"queue": "gpu"})).json()
        waiting = client.post("/jobs", json=spec_dict(recipe="clip_kd", teacher={"job": job["id"]}, resources={"queue": "gpu"})).json()
    assert waiting["state"] == "waiting"
    assert received(redis_url, "gpu") == [(RUN_JOB_TASK, [job["id"]])]
