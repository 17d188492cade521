"""Waiting for a job outlives a restart of the service, but not a service that was never there."""

from __future__ import annotations

import httpx
import pytest

from service import client as client_module
from service import client_streams
from service.client import Client, CliprdError, UnreachableError
from service.schemas import JobView
from service.store import jobs
from service.store.states import JobState
from tests.store_helpers import SUCCESS, Sessions, claim, create, read


def test_wait_bears_a_service_that_is_away_for_a_while(sessions: Sessions) -> None:
    job = create(sessions)
    queued = JobView.of(read(sessions, job.id)).model_dump_json()
    held = claim(sessions, job.id)
    with sessions.begin() as session:
        jobs.finish_job(session=session, job_id=job.id, lease_token=held.lease_token, outcome=SUCCESS)
    succeeded = JobView.of(read(sessions, job.id)).model_dump_json()
    answers = iter([queued, None, None, succeeded])

    def answer(request: httpx.Request) -> httpx.Response:
        body = next(answers)
        if body is None:
            raise httpx.ConnectError("refused", request=request)
        return httpx.Response(200, content=body)

    seen: list[JobState] = []
    with Client("http://service", transport=httpx.MockTransport(answer)) as client:
        finished = client.wait(job.id, poll_seconds=0, on_poll=lambda one: seen.append(one.state))
    assert finished.state is JobState.SUCCEEDED
    assert seen == [JobState.QUEUED, JobState.SUCCEEDED]


@pytest.mark.parametrize("patience", [0.0, 100.0])
def test_wait_gives_up_on_a_service_that_never_answered(patience: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "PATIENCE_SECONDS", patience)

    def refuse(request: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("refused", request=request)

    with (
        Client("http://service", transport=httpx.MockTransport(refuse)) as client,
        pytest.raises(UnreachableError, match="is the service running"),
    ):
        client.wait("0" * 36, poll_seconds=0)


def test_a_followed_log_goes_on_where_it_broke_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_streams, "RECONNECT_SECONDS", 0.0)
    asked: list[tuple[str | None, str | None]] = []
    answers = iter(
        [
            'id: 5\nevent: log\ndata: {"text": "one "}\n\n: still here\n\nid: 9\nevent: log\ndata: {"text": "two "}\n\n',
            None,
            'id: 14\nevent: log\ndata: {"text": "three"}\n\nid: 14\nevent: end\ndata: {"state": "succeeded"}\n\n',
        ]
    )

    def answer(request: httpx.Request) -> httpx.Response:
        asked.append((request.headers.get("Last-Event-ID"), request.url.params.get("tail")))
        body = next(answers)
        if body is None:
            raise httpx.ConnectError("refused", request=request)
        return httpx.Response(200, content=body, headers={"Content-Type": "text/event-stream"})

    with Client("http://service", transport=httpx.MockTransport(answer)) as client:
        assert "".join(client.follow_log("0" * 36, tail=3)) == "one two three"
    assert asked == [(None, "3"), ("9", None), ("9", None)]


def test_a_followed_log_ends_where_nothing_is_left_and_with_a_refusal() -> None:
    answers = iter([httpx.Response(204), httpx.Response(404, json={})])
    with Client("http://service", transport=httpx.MockTransport(lambda _: next(answers))) as client:
        assert list(client.follow_log("0" * 36)) == []
        with pytest.raises(CliprdError):
            list(client.follow_log("0" * 36))
