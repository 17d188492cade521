"""Server-sent events (https://html.spec.whatwg.org/multipage/server-sent-events.html): what is new of a job, until it ends.

A stream holds no connection of the database; it looks for news now and then. `sse-starlette` sends heartbeats, notices clients that
went away, and ends all streams when the server is told to stop.
"""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import anyio
from fastapi import Response
from fastapi.concurrency import run_in_threadpool
from sqlalchemy.orm import Session, sessionmaker
from sse_starlette import EventSourceResponse, JSONServerSentEvent, ServerSentEvent
from starlette.types import Receive, Scope, Send

from service.store.errors import JobNotFoundError
from service.store.jobs import get_job
from service.store.models import Job
from service.store.session import OUT_OF_REACH, reading

logger = logging.getLogger(__name__)

MEDIA_TYPE = "text/event-stream"
SHUTDOWN_GRACE_SECONDS = 2.0
"""What a stream has to end in good order when the server is told to stop; less than the server itself waits."""

ALLOWED_SECONDS = 30.0
"""Pause between looks whether a stream's client may still have it: its API key may be revoked meanwhile."""


class TooManyStreamsError(Exception):
    """As many streams are open as may be."""


class News(NamedTuple):
    """One event of a stream; a client that comes back with `position` as `Last-Event-ID` goes on after it."""

    position: int
    name: str
    data: dict[str, Any]


class Found(NamedTuple):
    """What a look found, oldest first."""

    news: Sequence[News]
    position: int
    """Where the next look goes on; where this one began, if there is nothing more yet."""


Look = Callable[[Session, Job, int], Found]
"""What is new of a job after a position."""


@dataclass(frozen=True)
class Wanted:
    """What a client wants to follow."""

    job_id: str
    look: Look
    position: int
    """After which it wants to be told."""
    is_resumed: bool
    """Whether it was told up to there by a stream before."""
    still_allowed: Callable[[], Awaitable[bool]]
    """Whether it may still have the stream."""


class Streams:
    """The open streams of one process, counted.

    Args:
        max_open: As many at once.
        poll_seconds: Pause between looks for news.
        heartbeat_seconds: Pause between comments that keep an idle connection open.
    """

    def __init__(self, *, max_open: int, poll_seconds: float, heartbeat_seconds: float) -> None:
        self._max_open = max_open
        self._poll_seconds = poll_seconds
        self._heartbeat_seconds = heartbeat_seconds
        self.num_open = 0  # changed by the event loop alone

    async def open(self, sessions: sessionmaker[Session], wanted: Wanted) -> Response:
        """A stream of what the look finds. Once the job has ended and all is told, it sends `end` with the job's state and ends. A client
        that comes back to a job that has ended, and misses nothing, gets 204, at which browsers stop. A stream whose client may not have it
        any more ends without `end`.

        Raises:
            JobNotFoundError: there is no such job.
            TooManyStreamsError: as many are open as may be.
        """
        if self.num_open >= self._max_open:
            raise TooManyStreamsError
        self.num_open += 1  # before anything is waited for, or all that come meanwhile would find the same room
        stream: Response | None = None
        try:
            first, state = await run_in_threadpool(_look, sessions, wanted, wanted.position)
            if wanted.is_resumed and state is not None and first.position == wanted.position:
                return Response(status_code=204)
            shutdown = anyio.Event()
            stream = _CountedResponse(
                self._follow(sessions, wanted, shutdown),
                ping=self._heartbeat_seconds,
                shutdown_event=shutdown,
                shutdown_grace_period=SHUTDOWN_GRACE_SECONDS,
                at_end=self._leave,
            )
        finally:
            if stream is None:
                self._leave()
        return stream

    def _leave(self) -> None:
        self.num_open -= 1

    async def _follow(self, sessions: sessionmaker[Session], wanted: Wanted, shutdown: anyio.Event) -> AsyncIterator[ServerSentEvent]:
        position = wanted.position
        try:
            allowed_until = time.monotonic() + ALLOWED_SECONDS
            while not shutdown.is_set():
                if time.monotonic() >= allowed_until:
                    if not await wanted.still_allowed():
                        logger.info("a stream of job %s ends, since its client is not allowed to any more", wanted.job_id)
                        return
                    allowed_until = time.monotonic() + ALLOWED_SECONDS
                found, end_state = await run_in_threadpool(_look, sessions, wanted, position)
                for one in found.news:
                    yield JSONServerSentEvent(one.data, event=one.name, id=str(one.position))
                is_all = found.position == position
                position = found.position
                if is_all and end_state is not None:
                    yield JSONServerSentEvent({"state": end_state}, event="end", id=str(position))
                    return
                if is_all:
                    with anyio.move_on_after(self._poll_seconds):
                        await shutdown.wait()
        except JobNotFoundError:
            return  # deleted meanwhile
        except OUT_OF_REACH as error:
            logger.warning("a stream of job %s ends, since the database can't be used (%s); its client comes back", wanted.job_id, error)


class _CountedResponse(EventSourceResponse):
    """Says when it is over, also where its client was gone before the first event was asked for."""

    def __init__(self, content: AsyncIterator[ServerSentEvent], *, at_end: Callable[[], None], **options: Any) -> None:
        super().__init__(content, **options)
        self._at_end = at_end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._at_end()


def _look(sessions: sessionmaker[Session], wanted: Wanted, position: int) -> tuple[Found, str | None]:
    """News, and the state of a job that had ended before they were looked for, so that none can follow."""
    with reading(sessions) as session:
        job = get_job(session=session, job_id=wanted.job_id)
        end_state = job.state.value if job.state.is_finished else None
        return wanted.look(session, job, position), end_state
