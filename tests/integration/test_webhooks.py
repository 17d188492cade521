"""Webhooks, from the change of a job to the signed message, on SQLite and PostgreSQL."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import httpx
import pytest
from pydantic import SecretStr, ValidationError
from standardwebhooks import Webhook, WebhookVerificationError

from service.store import jobs
from service.store import webhooks as store_webhooks
from service.store.failure_policy import what_to_do
from service.store.models import WebhookDelivery
from service.store.session import database_now, reading
from service.store.webhooks import RETRY_SECONDS, UNTAKEN_SECONDS, address_messages, drop_untaken, take_messages
from tests.dripping_receiver import dripping
from tests.store_helpers import FAILURE, Sessions, claim, create, finish
from worker import webhooks
from worker.settings import WorkerSettings
from worker.webhooks import Messenger

SECRET = "whsec_" + "c2VjcmV0" * 4
URLS = ("https://one/hook", "https://two/hook")


class Receivers(httpx.AsyncBaseTransport):
    """The network: takes what is sent, or refuses it with the statuses it was given; 0: nobody is there."""

    def __init__(self, statuses: Sequence[int] = ()) -> None:
        self.statuses = list(statuses)
        self.received: list[httpx.Request] = []

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        if self.statuses and (status := self.statuses.pop(0)) != 200:
            if status == 0:
                raise httpx.ConnectError("refused", request=request)
            return httpx.Response(status, headers={"Location": "https://elsewhere/"})
        self.received.append(request)
        return httpx.Response(204)


Deliver = Callable[[Sequence[str], Receivers], None]


@pytest.fixture
def deliver(database_url: str, monkeypatch: pytest.MonkeyPatch) -> Deliver:
    """A round of a worker with these URLs, of every one of its messengers, however long it takes. What fails is not due again before
    `make_due`."""
    monkeypatch.setattr(store_webhooks, "RETRY_SECONDS", [600] * len(RETRY_SECONDS))
    monkeypatch.setattr(webhooks, "ROUND_SECONDS", 600.0)

    def one_round(urls: Sequence[str], network: Receivers) -> None:
        settings = WorkerSettings(database_url=database_url, webhook_urls=tuple(urls), webhook_secret=SecretStr(SECRET))
        for url in urls:
            Messenger(settings, url, network).run_once()

    return one_round


def deliveries(sessions: Sessions) -> list[WebhookDelivery]:
    with reading(sessions) as session:
        return list(session.query(WebhookDelivery).order_by(WebhookDelivery.id))


def make_due(sessions: Sessions) -> None:
    with sessions.begin() as session:
        for one in session.query(WebhookDelivery):
            one.next_try_at = database_now(session) - timedelta(seconds=1)


def test_every_change_of_state_reaches_every_url_signed(sessions: Sessions, deliver: Deliver) -> None:
    job = create(sessions)
    claimed = claim(sessions, job.id)
    with sessions.begin() as session:
        jobs.mark_started(session=session, job_id=job.id, lease_token=claimed.lease_token)
    finish(sessions, claimed, FAILURE)
    network = Receivers()
    deliver(URLS, network)
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
    deliver(URLS, network)
    assert len(network.received) == 8


@pytest.mark.parametrize("status", [0, 302, 410, 500])
def test_what_does_not_arrive_is_tried_again_later_and_given_up_at_last(sessions: Sessions, deliver: Deliver, status: int) -> None:
    create(sessions)
    network = Receivers([status] + [200] * 10)
    deliver(URLS[:1], network)
    if status == 0:
        assert network.received == [], "who doesn't answer is asked no more in this round"
        deliver(URLS[:1], network)
    assert [json.loads(request.content)["type"] for request in network.received] == ["job.queued"]
    (failed,) = deliveries(sessions)
    deliver(URLS[:1], network)
    assert len(network.received) == 1, "it is not time yet"
    make_due(sessions)
    deliver(URLS[:1], network)
    assert network.received[-1].headers["webhook-id"] == failed.message_id
    assert deliveries(sessions) == []

    create(sessions)
    for _ in range(len(RETRY_SECONDS) + 1):
        assert len(deliveries(sessions)) == 2
        make_due(sessions)
        deliver(URLS[:1], Receivers([500] * 10))
    assert deliveries(sessions) == []


def test_only_a_worker_with_urls_touches_the_outbox_and_what_nobody_takes_expires(sessions: Sessions, deliver: Deliver) -> None:
    create(sessions)
    deliver((), Receivers())
    with sessions.begin() as session:
        assert drop_untaken(session=session) == 0
    assert len(deliveries(sessions)) == 2, "another worker may have URLs"
    with sessions.begin() as session:
        now = database_now(session)
        assert drop_untaken(session=session, now=now + timedelta(seconds=UNTAKEN_SECONDS - 60)) == 0
        assert drop_untaken(session=session, now=now + timedelta(seconds=UNTAKEN_SECONDS + 60)) == 2
    assert deliveries(sessions) == []


def test_a_url_that_this_worker_does_not_have_keeps_its_messages_until_they_expire(sessions: Sessions, deliver: Deliver) -> None:
    create(sessions)
    deliver(URLS, Receivers([500] * 4))
    make_due(sessions)
    network = Receivers()
    deliver(URLS[1:], network)
    assert {str(request.url) for request in network.received} == {URLS[1]}
    assert {one.url for one in deliveries(sessions)} == {URLS[0]}
    with sessions.begin() as session:
        later = database_now(session) + timedelta(seconds=UNTAKEN_SECONDS + 60)
        assert drop_untaken(session=session, now=later) == 2


def test_a_dead_url_costs_the_others_nothing_and_itself_one_try_a_round(sessions: Sessions, deliver: Deliver) -> None:
    for _ in range(20):
        create(sessions)

    class OneDead(Receivers):
        async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
            self.received.append(request)
            if str(request.url) == URLS[0]:
                raise httpx.ConnectTimeout("nobody there", request=request)
            return httpx.Response(204)

    network = OneDead()
    deliver(URLS, network)
    assert [str(request.url) for request in network.received].count(URLS[1]) == 40
    assert [str(request.url) for request in network.received].count(URLS[0]) == 1
    left = deliveries(sessions)
    assert sorted(one.num_tries for one in left) == [0] * 39 + [1]
    with reading(sessions) as session:
        now = database_now(session)
    assert sum(one.next_try_at <= now for one in left) == 39, "what was not tried is not held"
    network = Receivers()
    deliver(URLS, network)
    assert len(network.received) == 39


@pytest.mark.parametrize(
    ("answer", "num_left"),
    [(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000000\r\n\r\n", 0), (b"HTTP/1.1 200 OK\r\nx-", 2), (b"", 2)],
    ids=["body", "header", "no status"],
)
def test_a_receiver_that_drips_bytes_holds_nothing_up(
    sessions: Sessions, database_url: str, monkeypatch: pytest.MonkeyPatch, answer: bytes, num_left: int
) -> None:
    # Where the status comes, it is not the deadline that ends it: that is longer than the test waits.
    monkeypatch.setattr(webhooks, "DEADLINE_SECONDS", 1.0 if num_left else 600.0)
    create(sessions)
    with dripping(answer) as receiver:
        url = receiver.url
        settings = WorkerSettings(database_url=database_url, webhook_urls=(url,), webhook_secret=SecretStr(SECRET))
        messenger = threading.Thread(target=Messenger(settings, url).run_once, daemon=True)
        messenger.start()
        messenger.join(60)
        assert not messenger.is_alive()
    assert len(deliveries(sessions)) == num_left, "the status is all that counts"


def test_a_process_may_be_forked_while_a_receiver_is_waited_for(sessions: Sessions, database_url: str) -> None:
    create(sessions)
    found: list[bool] = []

    class Slow(Receivers):
        async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
            found.append(messenger.lock.locked())
            return await super().handle_async_request(request)

    settings = WorkerSettings(database_url=database_url, webhook_urls=URLS[:1], webhook_secret=SecretStr(SECRET))
    messenger = Messenger(settings, URLS[0], Slow())
    messenger.run_once()
    assert found == [False, False]


def test_workers_that_look_at_once_take_different_messages(sessions: Sessions) -> None:
    for _ in range(5):
        create(sessions)

    def take(_: int) -> list[tuple[str, str]]:
        with sessions.begin() as session:
            address_messages(session=session, urls=URLS)
            return [(one.message_id, url) for url in URLS for one in take_messages(session=session, url=url)]

    with ThreadPoolExecutor(4) as pool:
        taken = [one for some in pool.map(take, range(4)) for one in some]
    assert len(taken) == len(set(taken)) == 20


def test_each_of_several_secrets_signs(sessions: Sessions, database_url: str) -> None:
    other = "whsec_" + "b3RoZXIh" * 4
    create(sessions)
    network = Receivers()
    secrets = SecretStr(f"{SECRET}, {other}")
    settings = WorkerSettings(database_url=database_url, webhook_urls=URLS[:1], webhook_secret=secrets)
    Messenger(settings, URLS[0], network).run_once()
    request = network.received[0]
    for secret in (SECRET, other):
        Webhook(secret).verify(request.content, dict(request.headers))
    with pytest.raises(WebhookVerificationError):
        Webhook("whsec_" + "bm9ib2R5" * 4).verify(request.content, dict(request.headers))


@pytest.mark.parametrize(
    "values",
    [
        {"webhook_urls": "https://one"},
        {"webhook_urls": "https://one", "webhook_secret": "whsec_c2hvcnQ="},
        {"webhook_urls": "https://one", "webhook_secret": "x" * 40},
        {"webhook_urls": "https://one", "webhook_secret": f"{SECRET},whsec_c2hvcnQ="},
        {"webhook_urls": "https://one", "webhook_secret": ","},
        {"webhook_urls": "ftp://one", "webhook_secret": SECRET},
    ],
)
def test_settings_that_can_not_work_are_refused(values: dict[str, str]) -> None:
    with pytest.raises(ValidationError, match="webhook_"):
        WorkerSettings(**values)  # type: ignore[arg-type]
    good = WorkerSettings(webhook_urls="https://one, https://two", webhook_secret=SECRET)  # type: ignore[arg-type]
    assert good.webhook_urls == ("https://one", "https://two")
    assert SECRET not in repr(good)
