"""Delivers webhooks, signed as in Standard Webhooks (https://www.standardwebhooks.com), from the outbox in the store."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import NamedTuple
from urllib.parse import urlsplit

import httpx
from standardwebhooks import Webhook

from service.logs import about
from service.store.webhooks import Message, address_messages, mark_delivered, mark_undelivered, mark_untried, take_messages
from worker.settings import WorkerSettings
from worker.store_rounds import StoreRounds, Turn

logger = logging.getLogger(__name__)

DEADLINE_SECONDS = 10.0
"""Of one delivery, from the look-up of the name to the answer's status, however it is spread out."""
ROUND_SECONDS = 20.0
"""Of one round: no further message is begun after it. With the deadline it is less than messages are held (`HELD_SECONDS`)."""


class Tried(NamedTuple):
    """How a delivery went."""

    message: Message
    problem: str | None
    """None: it was received."""
    is_silent: bool = False
    """Whether there was no answer at all, so that the address need not be tried again at once."""


class Messenger(StoreRounds):
    """Rounds that deliver to one address, in the worker's parent process: an address that doesn't answer holds up no other one.

    Args:
        settings: The worker's, with the secrets that sign, each of which gives a signature.
        url: Where to deliver.
        transport: for tests: replaces the network.
    """

    def __init__(self, settings: WorkerSettings, url: str, transport: httpx.AsyncBaseTransport | None = None) -> None:
        name = f"webhooks to {urlsplit(url).hostname}"  # the rest of an address may be secret
        super().__init__(name, settings.database_url, [self._deliver], pause_seconds=settings.reaper_seconds)
        self._urls = settings.webhook_urls
        self._url = url
        self._signers = [Webhook(secret) for secret in settings.webhook_secrets]
        assert self._signers, "the settings have one where there are URLs"
        self._transport = transport

    def _deliver(self, turn: Turn) -> None:
        """Deliver the messages whose time has come. Any answer of 2xx is taken as received; all else is tried again later, and what could
        not be tried in this round is in the next one."""
        stop_at = time.monotonic() + ROUND_SECONDS
        with turn.sessions.begin() as session:
            address_messages(session=session, urls=self._urls)
        while time.monotonic() < stop_at:
            with turn.sessions.begin() as session:
                messages = take_messages(session=session, url=self._url)
            if not messages:
                return
            with turn.waiting():
                tried = asyncio.run(self._try_all(messages, stop_at))
            self._note(turn, messages, tried)
            if tried[-1].is_silent:
                return

    def _note(self, turn: Turn, messages: Sequence[Message], all_tried: Sequence[Tried]) -> None:
        with turn.sessions.begin() as session:
            for message, problem, _ in all_tried:
                if problem is None:
                    mark_delivered(session=session, delivery_id=message.delivery_id)
                    continue
                is_planned = mark_undelivered(session=session, delivery_id=message.delivery_id)
                level, what_next = (logging.WARNING, "is tried again later") if is_planned else (logging.ERROR, "is given up")
                extra = about(*message.about())
                logger.log(level, "webhook %s to %s: %s; it %s", message.message_id, self._url, problem, what_next, extra=extra)
            for message in messages[len(all_tried) :]:
                mark_untried(session=session, message=message)

    async def _try_all(self, messages: Sequence[Message], stop_at: float) -> list[Tried]:
        """Try at least the first one, and no more once there is no answer or no time."""
        all_tried: list[Tried] = []
        async with httpx.AsyncClient(timeout=DEADLINE_SECONDS, transport=self._transport) as client:
            for message in messages:
                tried = await self._try(client, message)
                all_tried.append(tried)
                if tried.is_silent or time.monotonic() > stop_at:
                    break
        return all_tried

    async def _try(self, client: httpx.AsyncClient, message: Message) -> Tried:
        now = datetime.now(UTC)
        headers = {
            "Content-Type": "application/json",
            "webhook-id": message.message_id,
            "webhook-timestamp": str(int(now.timestamp())),
            "webhook-signature": " ".join(signer.sign(message.message_id, now, message.body) for signer in self._signers),
        }
        try:
            async with (
                asyncio.timeout(DEADLINE_SECONDS),
                client.stream("POST", self._url, content=message.body, headers=headers) as response,
            ):
                problem = None if response.is_success else f"answered with status {response.status_code}"
        except TimeoutError:
            return Tried(message, f"no answer within {DEADLINE_SECONDS:g} s", is_silent=True)
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            return Tried(message, f"no answer ({type(error).__name__}: {error})", is_silent=True)
        return Tried(message, problem)
