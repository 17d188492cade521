"""Delivers webhooks, signed as in Standard Webhooks (https://www.standardwebhooks.com), from the outbox in the store."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from datetime import UTC, datetime

import httpx
from sqlalchemy.orm import Session, sessionmaker
from standardwebhooks import Webhook

from service.store.webhooks import Message, mark_delivered, mark_undelivered, take_messages

logger = logging.getLogger(__name__)

TIMEOUT_SECONDS = 5.0
ROUND_SECONDS = 10.0
"""Of one round: the reaper has other things to do. What was taken and not tried in time comes again later."""


def deliver_webhooks(
    sessions: sessionmaker[Session], urls: Sequence[str], secret: str | None, transport: httpx.BaseTransport | None = None
) -> None:
    """Deliver the messages whose time has come. Any answer of 2xx is taken as received; all else is tried again later.

    Args:
        sessions: of the store.
        urls: who is told of every change; without any, what waits is forgotten.
        secret: signs them: `whsec_` and base64. Needed if there are URLs.
        transport: for tests: replaces the network.
    """
    with sessions.begin() as session:
        messages = take_messages(session=session, urls=urls)
    if not messages:
        return
    assert secret is not None, "the settings have it where there are URLs"
    signer = Webhook(secret)
    stop_at = time.monotonic() + ROUND_SECONDS
    with httpx.Client(timeout=TIMEOUT_SECONDS, transport=transport) as client:
        for message in messages:
            if time.monotonic() > stop_at:
                return
            _deliver(client, signer, sessions, message)


def _deliver(client: httpx.Client, signer: Webhook, sessions: sessionmaker[Session], message: Message) -> None:
    problem = _send(client, signer, message)
    with sessions.begin() as session:
        if problem is None:
            mark_delivered(session=session, delivery_id=message.delivery_id)
        elif mark_undelivered(session=session, delivery_id=message.delivery_id):
            logger.warning("webhook %s to %s: %s; it is tried again later", message.message_id, message.url, problem)
        else:
            logger.error("webhook %s to %s: %s; it is given up", message.message_id, message.url, problem)


def _send(client: httpx.Client, signer: Webhook, message: Message) -> str | None:
    """What went wrong, or None."""
    now = datetime.now(UTC)
    headers = {
        "Content-Type": "application/json",
        "webhook-id": message.message_id,
        "webhook-timestamp": str(int(now.timestamp())),
        "webhook-signature": signer.sign(message.message_id, now, message.body),
    }
    try:
        response = client.post(message.url, content=message.body, headers=headers)
    except httpx.HTTPError as error:
        return f"no answer ({type(error).__name__}: {error})"
    return None if response.is_success else f"answered with status {response.status_code}"
