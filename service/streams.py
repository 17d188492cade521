"""Server-sent events (https://html.spec.whatwg.org/multipage/server-sent-events.html): what is new of a job, until it ends.

A stream holds no connection of the database; it looks for news now and then. `sse-starlette` sends heartbeats, notices clients that
went away, and ends all streams when the server is told to stop.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable, Sequence
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
        self._num_open = 0  # touched by the event loop alone

    async def open(self, sessions: sessionmaker[Session], job_id: str, look: Look, position: int, *, is_resumed: bool) -> Response:
        """A stream of what `look` finds after `position`. Once the job has ended and all is told, it sends `end` with the job's state
        and ends. A client that comes back to a job that has ended, and misses nothing, gets 204, at which browsers stop.

        Raises:
            JobNotFoundError: there is no such job.
            TooManyStreamsError: as many are open as may be.
        """
        if self._num_open >= self._max_open:
            raise TooManyStreamsError
        self._num_open += 1  # before anything is waited for, or all that come meanwhile would find the same room
        stream: Response | None = None
        try:
            first, state = await run_in_threadpool(_look, sessions, job_id, look, position)
            if is_resumed and state is not None and first.position == position:
                return Response(status_code=204)
            shutdown = anyio.Event()
            stream = _CountedResponse(
                self._follow(sessions, job_id, look, position, shutdown),
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
        self._num_open -= 1

    async def _follow(
        self, sessions: sessionmaker[Session], job_id: str, look: Look, position: int, shutdown: anyio.Event
    ) -> AsyncIterator[ServerSentEvent]:
        try:
            while not shutdown.is_set():
                found, end_state = await run_in_threadpool(_look, sessions, job_id, look, position)
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
            logger.warning("a stream of job %s ends, since the database can't be used (%s); its client comes back", job_id, error)


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


def _look(sessions: sessionmaker[Session], job_id: str, look: Look, position: int) -> tuple[Found, str | None]:
    """News, and the state of a job that had ended before they were looked for, so that none can follow."""
    with reading(sessions) as session:
        job = get_job(session=session, job_id=job_id)
        end_state = job.state.value if job.state.is_finished else None
        return look(session, job, position), end_state
