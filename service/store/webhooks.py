"""The outbox of webhooks: messages wait here until they are delivered, or were tried often enough."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any, NamedTuple

from sqlalchemy import delete, select, update
from sqlalchemy.orm import Session

from service.store.bulk import insert_rows
from service.store.kinds import EventKind
from service.store.models import Job, WebhookDelivery
from service.store.session import database_now

RETRY_SECONDS = (5, 60, 300, 1800, 7200, 18_000, 36_000, 36_000)
"""Pauses after the first, second, … failed try; after the last of them the message is given up, more than a day after the event."""

HELD_SECONDS = 60
"""A message that was taken for delivery is not taken again for as long, by which time it is delivered or its worker is gone."""


UNTAKEN_SECONDS = 24 * 3600
"""A message that nobody has taken for so long since its time came is dropped: no worker has URLs, or its URL is no longer wanted."""


class Message(NamedTuple):
    """A message that is to be delivered now."""

    delivery_id: int
    message_id: str
    body: str
    due_at: datetime
    """When its time came."""

    def about(self) -> tuple[str, int]:
        """The job and its attempt that it tells of."""
        data = json.loads(self.body)["data"]
        return data["job_id"], data["attempt"]


class WebhookEvent(NamedTuple):
    """An event that is told of."""

    job: Job
    kind: EventKind
    data: Mapping[str, Any]
    event_id: int

    def body(self, time: datetime) -> str:
        """As Standard Webhooks recommends."""
        job = self.job
        data = {"job_id": job.id, "name": job.name, "labels": job.labels, "attempt": job.attempt, "event_id": self.event_id, **self.data}
        return json.dumps({"type": f"job.{self.kind.value}", "timestamp": time.isoformat(), "data": data})


def add_messages(session: Session, events: Sequence[WebhookEvent], *, now: datetime) -> None:
    """Tell of events, in the transaction that writes them."""
    rows = [
        {"message_id": f"job_event_{one.event_id}", "url": None, "body": one.body(now), "num_tries": 0, "next_try_at": now}
        for one in events
    ]
    insert_rows(session, WebhookDelivery, rows)


def address_messages(*, session: Session, urls: Sequence[str], limit: int = 1000) -> None:
    """Address what is new to each of `urls`. Several workers may do so at once: each message is addressed by one."""
    assert urls, "without an address, what is new stays for a worker that has one"
    new = select(WebhookDelivery).where(WebhookDelivery.url.is_(None)).order_by(WebhookDelivery.id).limit(limit)
    for one in session.scalars(new.with_for_update(skip_locked=True)).all():
        for url in urls:
            session.add(WebhookDelivery(message_id=one.message_id, url=url, body=one.body, num_tries=0, next_try_at=one.next_try_at))
        session.delete(one)
    session.flush()


def take_messages(*, session: Session, url: str, limit: int = 20, now: datetime | None = None) -> list[Message]:
    """Take messages to `url` whose time has come, oldest first. Several workers may do so at once: each message is taken by one, which
    calls one of the next three functions for it."""
    now = now or database_now(session)
    due = select(WebhookDelivery).where(WebhookDelivery.next_try_at <= now, WebhookDelivery.url == url)
    due = due.order_by(WebhookDelivery.next_try_at, WebhookDelivery.id).limit(limit).with_for_update(skip_locked=True)
    taken = []
    for one in session.scalars(due).all():
        taken.append(Message(one.id, one.message_id, one.body, one.next_try_at))
        one.next_try_at = now + timedelta(seconds=HELD_SECONDS)
    session.flush()
    return taken


def mark_delivered(*, session: Session, delivery_id: int) -> None:
    """Forget a message that arrived."""
    session.execute(delete(WebhookDelivery).where(WebhookDelivery.id == delivery_id))


def mark_undelivered(*, session: Session, delivery_id: int) -> bool:
    """Plan the next try of a message that did not arrive. False: there is none, and the message is given up."""
    delivery = session.get(WebhookDelivery, delivery_id, with_for_update=True)
    if delivery is None:
        return False
    if delivery.num_tries == len(RETRY_SECONDS):
        session.delete(delivery)
        return False
    delivery.next_try_at = database_now(session) + timedelta(seconds=RETRY_SECONDS[delivery.num_tries])
    delivery.num_tries += 1
    return True


def mark_untried(*, session: Session, message: Message) -> None:
    """Leave a message that was taken to whoever takes it next, and when."""
    session.execute(update(WebhookDelivery).where(WebhookDelivery.id == message.delivery_id).values(next_try_at=message.due_at))


def drop_untaken(*, session: Session, now: datetime | None = None) -> int:
    """Drop the messages that nobody takes; how many were there."""
    cutoff = (now or database_now(session)) - timedelta(seconds=UNTAKEN_SECONDS)
    dropped = session.scalars(delete(WebhookDelivery).where(WebhookDelivery.next_try_at < cutoff).returning(WebhookDelivery.id))
    return len(dropped.all())
