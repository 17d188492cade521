"""Webhooks, from the change of a job to the signed message, on SQLite and PostgreSQL."""

from __future__ import annotations

import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import httpx
import pytest
from pydantic import ValidationError
from standardwebhooks import Webhook, WebhookVerificationError

from service.store import jobs
from service.store.failure_policy import what_to_do
from service.store.models import WebhookDelivery
from service.store.session import database_now, reading
from service.store.webhooks import RETRY_SECONDS, take_messages
from tests.store_helpers import FAILURE, Sessions, claim, create, finish
from worker.settings import WorkerSettings
from worker.webhooks import deliver_webhooks

SECRET = "whsec_" + "c2VjcmV0" * 4
URLS = ("https://one/hook", "https://two/hook")


class Receivers(httpx.BaseTransport):
    """The network: takes what is sent, or refuses it with the statuses it was given."""

    def __init__(self, statuses: Sequence[int] = ()) -> None:
        self.statuses = list(statuses)
        self.received: list[httpx.Request] = []

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        if self.statuses and (status := self.statuses.pop(0)) != 200:
            if status == 0:
                raise httpx.ConnectError("refused", request=request)
            return httpx.Response(status, headers={"Location": "https://elsewhere/"})
        self.received.append(request)
        return httpx.Response(204)


def deliveries(sessions: Sessions) -> list[WebhookDelivery]:
    with reading(sessions) as session:
        return list(session.query(WebhookDelivery).order_by(WebhookDelivery.id))


def make_due(sessions: Sessions) -> None:
    with sessions.begin() as session:
        for one in session.query(WebhookDelivery):
            one.next_try_at = database_now(session) - timedelta(seconds=1)


def test_every_change_of_state_reaches_every_url_signed(sessions: Sessions) -> None:
    job = create(sessions)
    claimed = claim(sessions, job.id)
    with sessions.begin() as session:
        jobs.mark_started(session=session, job_id=job.id, lease_token=claimed.lease_token)
    finish(sessions, claimed, FAILURE)
    network = Receivers()
    deliver_webhooks(sessions, URLS, SECRET, network)
    assert deliveries(sessions) == []
    for url in URLS:
        requests = [request for request in network.received if str(request.url) == url]
        bodies = [Webhook(SECRET).verify(request.content, dict(request.headers)) for request in requests]
        assert [body["type"] for body in bodies] == ["job.created", "job.queued", "job.claimed", "job.failed"]
        assert bodies[-1]["data"] | {"event_id": 0} == {
            "job_id": job.id,
            "name": "test",
            "labels": {},
            "attempt": 1,
            "event_id": 0,
            "reason": "diverged",
            "message": FAILURE.message,
            "what_to_do": what_to_do(FAILURE),
        }
    ids = [request.headers["webhook-id"] for request in network.received]
    assert len(set(ids)) == 4
    with pytest.raises(WebhookVerificationError):
        Webhook(SECRET).verify(network.received[0].content + b" ", dict(network.received[0].headers))
    deliver_webhooks(sessions, URLS, SECRET, network)
    assert len(network.received) == 8


@pytest.mark.parametrize("status", [0, 302, 410, 500])
def test_what_does_not_arrive_is_tried_again_later_and_given_up_at_last(sessions: Sessions, status: int) -> None:
    create(sessions)
    network = Receivers([status] + [200] * 10)
    deliver_webhooks(sessions, URLS[:1], SECRET, network)
    assert [json.loads(request.content)["type"] for request in network.received] == ["job.queued"]
    (failed,) = deliveries(sessions)
    deliver_webhooks(sessions, URLS[:1], SECRET, network)
    assert len(network.received) == 1, "it is not time yet"
    make_due(sessions)
    deliver_webhooks(sessions, URLS[:1], SECRET, network)
    assert network.received[-1].headers["webhook-id"] == failed.message_id
    assert deliveries(sessions) == []

    create(sessions)
    for _ in range(len(RETRY_SECONDS) + 1):
        assert len(deliveries(sessions)) == 2
        make_due(sessions)
        deliver_webhooks(sessions, URLS[:1], SECRET, Receivers([500] * 10))
    assert deliveries(sessions) == []


def test_without_urls_nothing_is_kept(sessions: Sessions) -> None:
    create(sessions)
    assert len(deliveries(sessions)) == 2
    deliver_webhooks(sessions, (), None)
    assert deliveries(sessions) == []


def test_a_url_that_is_no_longer_wanted_is_told_nothing_more(sessions: Sessions) -> None:
    create(sessions)
    deliver_webhooks(sessions, URLS, SECRET, Receivers([500] * 4))
    make_due(sessions)
    network = Receivers()
    deliver_webhooks(sessions, URLS[1:], SECRET, network)
    assert {str(request.url) for request in network.received} == {URLS[1]}
    assert deliveries(sessions) == []


def test_workers_that_look_at_once_take_different_messages(sessions: Sessions) -> None:
    for _ in range(5):
        create(sessions)

    def take(_: int) -> list[tuple[str, str]]:
        with sessions.begin() as session:
            return [(one.message_id, one.url) for one in take_messages(session=session, urls=URLS)]

    with ThreadPoolExecutor(4) as pool:
        taken = [one for some in pool.map(take, range(4)) for one in some]
    assert len(taken) == len(set(taken)) == 20


@pytest.mark.parametrize(
    "values",
    [
        {"webhook_urls": "https://one"},
        {"webhook_urls": "https://one", "webhook_secret": "whsec_c2hvcnQ="},
        {"webhook_urls": "https://one", "webhook_secret": "x" * 40},
        {"webhook_urls": "ftp://one", "webhook_secret": SECRET},
    ],
)
def test_settings_that_can_not_work_are_refused(values: dict[str, str]) -> None:
    with pytest.raises(ValidationError, match="webhook_"):
        WorkerSettings(**values)  # type: ignore[arg-type]
    good = WorkerSettings(webhook_urls="https://one, https://two", webhook_secret=SECRET)  # type: ignore[arg-type]
    assert good.webhook_urls == ("https://one", "https://two")
    assert SECRET not in repr(good)
