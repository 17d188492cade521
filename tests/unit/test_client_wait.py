"""Waiting for a job outlives a restart of the service, but not a service that was never there."""

from __future__ import annotations

import httpx
import pytest

from service import client as client_module
from service.client import Client, UnreachableError
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
