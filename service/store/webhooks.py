"""The outbox of webhooks: messages wait here until they are delivered, or were tried often enough."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any, NamedTuple

from sqlalchemy import delete, insert, select
from sqlalchemy.orm import Session

from service.store.models import EventKind, Job, WebhookDelivery
from service.store.session import database_now

RETRY_SECONDS = (5, 60, 300, 1800, 7200, 18_000, 36_000, 36_000)
"""Pauses after the first, second, … failed try; after the last of them the message is given up, more than a day after the event."""

HELD_SECONDS = 60
"""A message that was taken for delivery is not taken again for as long, by which time it is delivered or its worker is gone."""


class Message(NamedTuple):
    """A message that is to be delivered now."""

    delivery_id: int
    message_id: str
    url: str
    body: str


class Told(NamedTuple):
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


def add_messages(session: Session, events: Sequence[Told], *, now: datetime) -> None:
    """Tell of events, in the transaction that writes them."""
    rows = [
        {"message_id": f"job_event_{one.event_id}", "url": None, "body": one.body(now), "num_tries": 0, "next_try_at": now}
        for one in events
    ]
    if rows:
        session.execute(insert(WebhookDelivery), rows)


def take_messages(*, session: Session, urls: Sequence[str], limit: int = 20, now: datetime | None = None) -> list[Message]:
    """Address what is new, to each of `urls` (to none: forget it), and take messages whose time has come, oldest first. Several workers
    may do so at once: each message is taken by one. Messages to URLs that are no longer wanted are forgotten."""
    now = now or database_now(session)
    new = select(WebhookDelivery).where(WebhookDelivery.url.is_(None)).order_by(WebhookDelivery.id).with_for_update(skip_locked=True)
    for one in session.scalars(new).all():
        for url in urls:
            session.add(WebhookDelivery(message_id=one.message_id, url=url, body=one.body, num_tries=0, next_try_at=one.next_try_at))
        session.delete(one)
    session.flush()
    session.execute(delete(WebhookDelivery).where(WebhookDelivery.url.is_not(None), WebhookDelivery.url.not_in(urls)))
    due = select(WebhookDelivery).where(WebhookDelivery.next_try_at <= now, WebhookDelivery.url.is_not(None))
    due = due.order_by(WebhookDelivery.next_try_at, WebhookDelivery.id).limit(limit).with_for_update(skip_locked=True)
    taken = []
    for one in session.scalars(due).all():
        assert one.url is not None
        one.next_try_at = now + timedelta(seconds=HELD_SECONDS)
        taken.append(Message(one.id, one.message_id, one.url, one.body))
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
