"""Events, metrics and logs over the API, as lists and as streams."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any
from unittest.mock import AsyncMock

import httpx
import pytest
from fastapi import Response
from fastapi.testclient import TestClient
from sqlalchemy.orm import Session
from starlette.types import Message

from cliprd_core.run_dir import MetricsRecord
from service.app import create_app
from service.routes import streams as streams_routes
from service.settings import Settings
from service.store import jobs, logs
from service.store.errors import JobNotFoundError
from service.store.keys import KeyScope, create_key, revoke_key
from service.store.models import Job
from service.store.session import make_engine, make_sessions, migrate
from service.streams import Found, Streams, TooManyStreamsError, Wanted
from tests.store_helpers import FAILURE, Sessions, claim, create, evaluated, finish, local_client, measured

STREAM = {"Accept": "text/event-stream"}
SHUTDOWN_SECONDS = 100
TIMEOUT_SECONDS = 60.0


@pytest.fixture
def settings(settings: Settings) -> Settings:
    return settings.model_copy(update={"stream_poll_seconds": 0.05})


@pytest.fixture
def sessions(settings: Settings) -> Iterator[Sessions]:
    migrate(settings.database_url)
    engine = make_engine(settings.database_url)
    yield make_sessions(engine)
    engine.dispose()


def lived(sessions: Sessions) -> str:
    """A job that ran and failed."""
    job_id = create(sessions).id
    claimed = claim(sessions, job_id)
    lease: dict[str, Any] = {"job_id": job_id, "lease_token": claimed.lease_token}
    with sessions.begin() as session:
        jobs.record_metrics(session=session, **lease, records=[measured(step, train_loss=1 / step, train_lr=0.1) for step in (1, 2, 3)])
        jobs.record_evaluations(session=session, **lease, records=[evaluated(3)])
        logs.append_log(session=session, **lease, text="first\nsecond\n")
    finish(sessions, claimed, FAILURE)
    return job_id


def parse(lines: Iterator[str]) -> Iterator[tuple[str, str | None, Any]]:
    """Event, id and data of each event of a stream."""
    fields: dict[str, str] = {}
    for line in lines:
        if not line and "data" in fields:
            yield fields["event"], fields.get("id"), json.loads(fields["data"])
            fields = {}
        elif line and not line.startswith(":"):
            name, _, value = line.partition(": ")
            fields[name] = value


def streamed(client: TestClient, path: str, last_event_id: str | None = None, **query: Any) -> list[tuple[str, str | None, Any]]:
    headers = STREAM if last_event_id is None else {**STREAM, "Last-Event-ID": last_event_id}
    response = client.get(path, params=query or None, headers=headers)  # an empty one would take the path's own away
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    return list(parse(iter(response.text.splitlines())))


def test_events_as_a_list_and_as_a_stream(client: TestClient, sessions: Sessions) -> None:
    job_id = lived(sessions)
    path = f"/jobs/{job_id}/events"
    listed = client.get(path).json()["events"]
    assert [one["kind"] for one in listed] == ["created", "queued", "claimed", "evaluated", "failed"]
    assert [one["kind"] for one in client.get(path, params={"after": listed[1]["id"], "limit": 1}).json()["events"]] == ["claimed"]
    events = streamed(client, path)
    assert events == [*((one["kind"], str(one["id"]), one) for one in listed), ("end", events[-1][1], {"state": "failed"})]
    assert [event for event, _, _ in streamed(client, path, last_event_id=str(listed[2]["id"]))] == ["evaluated", "failed", "end"]
    assert client.get(path, headers={**STREAM, "Last-Event-ID": str(listed[-1]["id"])}).status_code == 204
    assert client.get(path, headers={**STREAM, "Last-Event-ID": "x"}).status_code == 422
    for headers in ({}, STREAM):
        assert client.get("/jobs/00000000-none/events", headers=headers).status_code == 404


def test_metrics_as_a_stream(client: TestClient, sessions: Sessions) -> None:
    path = f"/jobs/{lived(sessions)}/metrics/stream"
    events = streamed(client, path, names="train/loss")
    assert [(event, data) for event, _, data in events[:-1]] == [
        ("metrics", {"step": step, "values": {"train/loss": 1 / step}}) for step in (1, 2, 3)
    ]
    second = events[1][1]
    assert [data.get("step") for _, _, data in streamed(client, path, last_event_id=second)] == [3, None]
    assert [data["step"] for _, _, data in streamed(client, path, since_step=2)[:-1]] == [2, 3]
    assert client.get(path, headers={"Last-Event-ID": str(events[2][1])}).status_code == 204


def test_logs_as_text_and_as_a_stream(client: TestClient, sessions: Sessions) -> None:
    path = f"/jobs/{lived(sessions)}/log"
    response = client.get(path)
    assert (response.text, response.headers["content-type"]) == ("first\nsecond\n", "text/plain; charset=utf-8")
    assert client.get(path, params={"tail": 1}).text == "second\n"
    assert [data for _, _, data in streamed(client, path)] == [{"text": "first\nsecond\n"}, {"state": "failed"}]
    assert streamed(client, path, tail=1)[0] == ("log", "13", {"text": "second\n"})
    assert client.get("/jobs/00000000-none/log").status_code == 404
    assert client.get(path, params={"tail": 0}).status_code == 422


@pytest.fixture
def has_told(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """A stream of events that is open has told of the first ones."""
    told, look = threading.Event(), streams_routes._events

    def look_again(session: Session, job: Job, position: int) -> Found:
        if position > 0:
            told.set()
        return look(session, job, position)

    monkeypatch.setattr(streams_routes, "_events", look_again)
    return told


def test_a_stream_of_a_job_that_is_deleted_meanwhile_ends(client: TestClient, sessions: Sessions, has_told: threading.Event) -> None:
    job_id = create(sessions).id
    with sessions.begin() as session:
        jobs.request_pause(session=session, job_id=job_id)

    def cancel_and_delete() -> None:
        has_told.wait(60)
        with sessions.begin() as session:
            jobs.request_cancel(session=session, job_id=job_id)
            jobs.delete_job(session=session, job_id=job_id)

    thread = threading.Thread(target=cancel_and_delete)
    thread.start()
    assert [event for event, _, _ in streamed(client, f"/jobs/{job_id}/events")] == ["created", "queued", "paused"]
    thread.join()


@pytest.fixture
def api(settings: Settings, sessions: Sessions) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """The API as a process of its own that keeps one stream open at most, with a heartbeat each second."""
    values = {"max_streams": 1, "stream_heartbeat_seconds": 1, "port": 0, "shutdown_seconds": SHUTDOWN_SECONDS}
    known = settings.model_copy(update=values).model_dump(mode="json")
    environment = {f"CLIPRD_{name.upper()}": str(value) for name, value in known.items()}
    command = [sys.executable, "-m", "service"]
    with subprocess.Popen(command, env={**os.environ, **environment}, stderr=subprocess.PIPE) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if b"http://127.0.0.1:" in line:
                yield line.decode().split("running on ")[1].split(" ")[0], process
                break
        process.kill()


def test_news_arrive_while_they_happen_and_a_shutdown_ends_the_stream(api: tuple[str, subprocess.Popen[bytes]], sessions: Sessions) -> None:
    url, process = api
    job_id = create(sessions).id
    with (
        httpx.Client(base_url=url, timeout=TIMEOUT_SECONDS, trust_env=False) as client,
        client.stream("GET", f"/jobs/{job_id}/events", headers=STREAM) as stream,
    ):
        lines = stream.iter_lines()
        events = parse(lines)
        assert [next(events)[0] for _ in range(2)] == ["created", "queued"]
        refused = client.get(f"/jobs/{job_id}/log", headers=STREAM)
        assert (refused.status_code, refused.json()["type"]) == (503, "urn:cliprd:problem:too-many-streams")
        assert client.get(f"/jobs/{job_id}/log").status_code == 200
        claim(sessions, job_id)
        assert next(events)[0] == "claimed"
        assert next(lines).startswith(": ping"), "a heartbeat"
        started = time.monotonic()
        process.send_signal(signal.SIGTERM)
        assert list(events) == []
        assert process.wait(SHUTDOWN_SECONDS) in (0, -signal.SIGTERM)
        assert time.monotonic() - started < SHUTDOWN_SECONDS / 2, "it did not wait for the stream's client"


def test_values_that_a_step_gets_after_it_was_told_are_told(api: tuple[str, subprocess.Popen[bytes]], sessions: Sessions) -> None:
    """The trainer writes an evaluation after the training values of the same step; a resumed run writes steps anew."""
    job_id = create(sessions).id
    claimed = claim(sessions, job_id)

    def write(*records: MetricsRecord) -> None:
        with sessions.begin() as session:
            jobs.record_metrics(session=session, job_id=job_id, lease_token=claimed.lease_token, records=records)

    write(*(measured(step, train_loss=1 / step) for step in (1, 2)))
    with (
        httpx.Client(base_url=api[0], timeout=TIMEOUT_SECONDS, trust_env=False) as client,
        client.stream("GET", f"/jobs/{job_id}/metrics/stream") as stream,
    ):
        told = ((event, data) for event, _, data in parse(stream.iter_lines()))
        assert [next(told)[1]["step"] for _ in range(2)] == [1, 2]
        write(measured(2, evaluation_top1=0.5))
        assert next(told) == ("metrics", {"step": 2, "values": {"evaluation/top1": 0.5, "train/loss": 0.5}})
        write(measured(2, attempt=2, train_loss=7.0))
        assert next(told) == ("metrics", {"step": 2, "values": {"evaluation/top1": 0.5, "train/loss": 7.0}})
        write(measured(2, train_loss=0.5), measured(2, attempt=2, train_loss=7.0))  # a replay
        finish(sessions, claimed, FAILURE)
        assert list(told) == [("end", {"state": "failed"})]


def test_a_client_that_knows_no_end_comes_back_once(client: TestClient, sessions: Sessions) -> None:
    """A browser's EventSource opens every stream that ended again, with the last id it saw, until it gets 204."""
    job_id = create(sessions).id
    with sessions.begin() as session:
        jobs.request_cancel(session=session, job_id=job_id)
    events = f"/jobs/{job_id}/events?after=1000"
    for path in (f"/jobs/{job_id}/log", f"/jobs/{job_id}/metrics/stream", f"/jobs/{job_id}/metrics/stream?since_step=7", events):
        [(event, event_id, data)] = streamed(client, path)  # nothing was printed or measured, or happened since
        assert (event, data) == ("end", {"state": "cancelled"})
        assert event_id is not None
        assert client.get(path, headers={**STREAM, "Last-Event-ID": event_id}).status_code == 204


def test_a_list_goes_on_after_the_last_event_id_as_a_stream_does(client: TestClient, sessions: Sessions) -> None:
    path = f"/jobs/{lived(sessions)}"
    listed = client.get(f"{path}/events").json()["events"]
    for query in ({}, {"after": listed[0]["id"]}, {"after": listed[-1]["id"]}):
        answer = client.get(f"{path}/events", params=query, headers={"Last-Event-ID": str(listed[2]["id"])})
        assert answer.json()["events"] == listed[3:]
    for query in ({}, {"tail": 2}):
        assert client.get(f"{path}/log", params=query, headers={"Last-Event-ID": "6"}).text == "second\n"


@pytest.mark.parametrize("headers", [{}, STREAM])
def test_an_event_id_that_was_never_issued_is_refused(client: TestClient, sessions: Sessions, headers: dict[str, str]) -> None:
    path = f"/jobs/{lived(sessions)}"
    other = lived(sessions)
    newest = {
        "events": client.get(f"{path}/events").json()["events"][-1]["id"],
        "log": len(client.get(f"{path}/log").text),
        "metrics/stream": int(streamed(client, f"{path}/metrics/stream")[-1][1] or ""),
    }
    for name, last in newest.items():
        assert client.get(f"{path}/{name}", headers={**headers, "Last-Event-ID": str(last)}).status_code in (200, 204)
        refused = client.get(f"{path}/{name}", headers={**headers, "Last-Event-ID": str(last + 1)})
        assert refused.status_code == 422
        [error] = refused.json()["errors"]
        assert (error["field"], error["problem"]) == ("Last-Event-ID", f"is {last + 1}, but the newest event here has the id {last}")
        assert "Leave the header out to begin anew." in error["remedy"]
        assert client.get(f"/jobs/00000000-none/{name}", headers={**headers, "Last-Event-ID": "7"}).status_code == 404
    of_other = client.get(f"/jobs/{other}/events").json()["events"][-1]["id"]
    assert client.get(f"{path}/events", params={"after": of_other}).json() == {"events": []}, "ids are shared by all jobs"


def test_a_stream_of_few_metrics_reads_on_past_steps_without_them(
    client: TestClient, sessions: Sessions, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.routes.streams.STEPS_PER_LOOK", 2)
    job_id = create(sessions).id
    claimed = claim(sessions, job_id)
    with sessions.begin() as session:
        records = [*(measured(step, train_loss=1.0) for step in range(1, 8)), measured(7, evaluation_top1=0.5), measured(8, train_loss=1.0)]
        jobs.record_metrics(session=session, job_id=job_id, lease_token=claimed.lease_token, records=records)
    finish(sessions, claimed, FAILURE)
    events = streamed(client, f"/jobs/{job_id}/metrics/stream", names="evaluation/*")
    assert [data for _, _, data in events] == [{"step": 7, "values": {"evaluation/top1": 0.5}}, {"state": "failed"}]
    assert client.get(f"/jobs/{job_id}/metrics/stream", headers={"Last-Event-ID": str(events[-1][1])}).status_code == 204


def test_a_stream_that_is_left_makes_room(api: tuple[str, subprocess.Popen[bytes]], sessions: Sessions) -> None:
    url, _ = api
    path = f"/jobs/{create(sessions).id}/events"
    with httpx.Client(base_url=url, timeout=TIMEOUT_SECONDS, trust_env=False) as client:
        for _ in range(3):
            deadline = time.monotonic() + TIMEOUT_SECONDS
            while True:
                with client.stream("GET", path, headers=STREAM) as stream:
                    if stream.status_code == 200:
                        assert next(parse(stream.iter_lines()))[0] == "created"
                        break
                assert time.monotonic() < deadline
                time.sleep(0.05)


def test_a_stream_ends_when_its_key_is_revoked(
    settings: Settings, sessions: Sessions, monkeypatch: pytest.MonkeyPatch, has_told: threading.Event
) -> None:
    monkeypatch.setattr("service.streams.ALLOWED_SECONDS", 0.2)  # after what there is was told
    job_id = create(sessions).id
    with sessions.begin() as session:
        stored, key = create_key(session=session, name="follower", scope=KeyScope.READ)
        _, other = create_key(session=session, name="other", scope=KeyScope.READ)

    def revoke() -> None:
        with sessions.begin() as session:
            revoke_key(session=session, key_id=stored.id)

    def end_the_job() -> None:
        claimed = claim(sessions, job_id)
        finish(sessions, claimed, FAILURE)

    with local_client(create_app(settings)) as client:
        told: list[str] = []

        def follow(key: str) -> None:
            lines = client.get(f"/jobs/{job_id}/events", headers={**STREAM, "Authorization": f"Bearer {key}"}).text.splitlines()
            told.append(" ".join(event for event, _, _ in parse(iter(lines))))

        for one, then, expected in ((key, revoke, "created queued"), (other, end_the_job, "created queued claimed failed end")):
            has_told.clear()
            follower = threading.Thread(target=follow, args=(one,))
            follower.start()
            assert has_told.wait(TIMEOUT_SECONDS)
            then()
            follower.join(TIMEOUT_SECONDS)
            assert told.pop() == expected


def test_streams_that_are_opened_at_once_are_counted_until_they_end(sessions: Sessions) -> None:
    job_id, ended = create(sessions).id, lived(sessions)
    gone: dict[str, Any] = {"type": "http.disconnect"}

    def wanted(job: str, *, is_resumed: bool = False) -> Wanted:
        return Wanted(job, lambda *_: Found([], 0), 0, is_resumed=is_resumed, still_allowed=AsyncMock(return_value=True))

    async def opened(streams: Streams, job: str = job_id, *, is_resumed: bool = False) -> Response | BaseException:
        opening = streams.open(sessions, wanted(job, is_resumed=is_resumed))
        return (await asyncio.gather(opening, return_exceptions=True))[0]

    async def leave(response: Response) -> None:
        """A client that is gone before the first byte."""

        async def receive() -> Message:
            return gone

        async def send(_: Message) -> None:
            await asyncio.sleep(0)

        await response({"type": "http", "method": "GET"}, receive, send)

    async def run() -> None:
        streams = Streams(max_open=2, poll_seconds=0.01, heartbeat_seconds=15)
        for _ in range(3):  # as many fit again, once those before are gone
            answers = await asyncio.gather(*(opened(streams) for _ in range(20)))
            accepted = [one for one in answers if isinstance(one, Response)]
            assert len(accepted) == 2
            assert [type(one) for one in answers if not isinstance(one, Response)] == [TooManyStreamsError] * 18
            for response in accepted:
                await leave(response)
            for _ in range(3):  # none of these keeps a place
                assert isinstance(await opened(streams, "00000000-none"), JobNotFoundError)
                nothing_new = await opened(streams, ended, is_resumed=True)
                assert isinstance(nothing_new, Response)
                assert nothing_new.status_code == 204
                waiting = asyncio.create_task(streams.open(sessions, wanted(job_id)))
                await asyncio.sleep(0)
                waiting.cancel()
                await asyncio.wait([waiting])

    asyncio.run(run())


def test_the_reference_describes_the_streams(settings: Settings) -> None:
    paths = create_app(settings).openapi()["paths"]
    for path in ("/jobs/{job_id}/events", "/jobs/{job_id}/log", "/jobs/{job_id}/metrics/stream"):
        responses = paths[path]["get"]["responses"]
        assert "text/event-stream" in responses["200"]["content"]
        assert {"204", "404", "503"} <= set(responses)
