"""What happens to a job and what it prints and measures: as lists, and as streams while it happens."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Header, Query, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from sqlalchemy.orm import Session

from service.auth import STILL_ALLOWED
from service.errors import NeverIssuedError, problem_responses
from service.routes.dependencies import JobIdInPath, Services, ServicesOf
from service.schemas import EventList, EventView
from service.store import events, jobs, logs, metrics
from service.store.models import Job
from service.store.session import reading
from service.streams import MEDIA_TYPE, Found, Look, News, Wanted
from service.strict_query import MAX_METRIC_NAMES, StrictRoute, metric_names

router = APIRouter(prefix="/jobs", tags=["jobs"], route_class=StrictRoute)

STEPS_PER_LOOK = 500
CHUNKS_PER_LOOK = 16

_STREAM: dict[str, Any] = {MEDIA_TYPE: {}}  # OpenAPI 3.1 can't describe the events of a stream, only a body as a whole


def _wants_stream(accept: Annotated[str, Header(include_in_schema=False)] = "") -> bool:
    return MEDIA_TYPE in accept


WantsStream = Annotated[bool, Depends(_wants_stream)]
Newest = Callable[..., int]
"""The highest id that a job's stream can have had, 0 before the first; called with `session` and `job_id`."""


@dataclass(frozen=True)
class Follower:
    """Who wants to be told of a job, and from where on: after the event that it saw last, else where its query starts (`first`)."""

    services: Services
    still_allowed: Callable[[], Awaitable[bool]]
    last_event_id: int | None

    def start(self, session: Session, job_id: str, newest: Newest, first: int) -> int:
        """After which id to tell.

        Raises:
            JobNotFoundError: there is no such job.
            NeverIssuedError: no event had the id. (An empty stream that the query starts further on ends with that as its id.)
        """
        jobs.get_job(session=session, job_id=job_id)
        if self.last_event_id is None:
            return first
        issued = max(first, newest(session=session, job_id=job_id))
        if self.last_event_id > issued:
            raise NeverIssuedError(self.last_event_id, issued)
        return self.last_event_id

    async def follow(self, job_id: str, look: Look, newest: Newest, first: int) -> Response:
        """A stream. Raises as `start` and `Streams.open` do."""
        is_resumed = self.last_event_id is not None
        start = await run_in_threadpool(self._looked_up_start, job_id, newest, first) if is_resumed else first
        wanted = Wanted(job_id, look, start, is_resumed=is_resumed, still_allowed=self.still_allowed)
        return await self.services.streams.open(self.services.sessions, wanted)

    def _looked_up_start(self, job_id: str, newest: Newest, first: int) -> int:
        with reading(self.services.sessions) as session:
            return self.start(session, job_id, newest, first)


async def _follower(
    services: ServicesOf,
    request: Request,
    last_event_id: Annotated[
        int | None,
        Header(
            alias="Last-Event-ID",
            ge=0,
            lt=2**63,
            description="The `id` of the last event that arrived: what came after it is told, wherever the query would start. One that"
            " this stream of this job never had is refused (422).",
        ),
    ] = None,
) -> Follower:
    return Follower(services, getattr(request.state, STILL_ALLOWED), last_event_id)


FollowerOf = Annotated[Follower, Depends(_follower)]


@router.get(
    "/{job_id}/events",
    summary="What happened to a job",
    response_model=EventList,
    responses={
        200: {"content": _STREAM},
        204: {"description": "Stream: the job has ended, and nothing is new"},
        **problem_responses(404, 500, 503),
    },
)
async def read_events(
    *,
    services: ServicesOf,
    job_id: JobIdInPath,
    is_stream: WantsStream,
    after: Annotated[
        int,
        Query(ge=0, lt=2**63, description="Only events with a higher id; that of a list's last one for the list that follows."),
    ] = 0,
    limit: Annotated[
        int, Query(ge=1, le=1000, description="Events, at most; ask again with `after` where as many came. A stream has all.")
    ] = 100,
    follower: FollowerOf,
) -> Response:
    """Events, oldest first; each was written together with the change it tells of. With `Accept: text/event-stream` they come as they
    happen, until the job ends: `event` is the kind, `id` serves to go on after a break, and the last one is `end` with the job's state.
    """
    if is_stream:
        return await follower.follow(job_id, _events, events.newest_id, after)

    def read() -> EventList:
        with reading(services.sessions) as session:
            start = follower.start(session, job_id, events.newest_id, after)
            return EventList.of(events.list_events(session=session, job_id=job_id, after=start, limit=limit))

    return JSONResponse((await run_in_threadpool(read)).model_dump(mode="json"))


@router.get(
    "/{job_id}/metrics/stream",
    summary="Metrics as they are measured",
    response_class=Response,
    responses={
        200: {"description": "Server-sent events", "content": _STREAM},
        204: {"description": "The job has ended, and nothing is new"},
        **problem_responses(404, 500, 503),
    },
)
async def stream_metrics(
    follower: FollowerOf,
    job_id: JobIdInPath,
    names: Annotated[list[str], Query(max_length=MAX_METRIC_NAMES, description="As of the metric series.")] = ["*"],  # noqa: B006
    since_step: Annotated[int, Query(ge=0, lt=2**63, description="First step of interest.")] = 0,
) -> Response:
    """Events `metrics`, `{"step": …, "values": {name: value}}`, in the order of writing. A step is told again, with all that is known of
    it, when more of it becomes known: an evaluation's values come after the training's, and a resumed run measures the steps after its
    checkpoint again. The later event counts. The last one is `end` with the job's state. "Try it out" shows nothing before then; look at
    one while it comes with `curl -N`."""
    look = partial(_metrics, metric_names(names), since_step)
    return await follower.follow(job_id, look, metrics.newest_position, since_step)


@router.get(
    "/{job_id}/log",
    summary="A job's log",
    response_class=PlainTextResponse,
    responses={
        200: {"content": _STREAM},
        204: {"description": "Stream: the job has ended, and nothing is new"},
        **problem_responses(404, 500, 503),
    },
)
async def read_log(
    *,
    services: ServicesOf,
    job_id: JobIdInPath,
    is_stream: WantsStream,
    tail: Annotated[int | None, Query(ge=1, le=100_000, description="Only the last lines, as many. Left out: all.")] = None,
    follower: FollowerOf,
) -> Response:
    """What the training processes printed, over all attempts, and after each failed attempt why it failed; of a very long log the beginning
    is dropped. With `Accept: text/event-stream` it comes as events `log`, `{"text": …}`, while it is printed, until `end` with the job's
    state."""

    def first() -> int:
        with reading(services.sessions) as session:
            jobs.get_job(session=session, job_id=job_id)
            return 0 if tail is None else logs.tail_start(session=session, job_id=job_id, num_lines=tail)

    position = 0 if follower.last_event_id is not None else await run_in_threadpool(first)
    if is_stream:
        return await follower.follow(job_id, _log, logs.end_of_log, position)

    def read() -> str:
        with reading(services.sessions) as session:
            start = follower.start(session, job_id, logs.end_of_log, position)
            return logs.read_log(session=session, job_id=job_id, after=start)[0]

    return PlainTextResponse(await run_in_threadpool(read))


def _events(session: Session, job: Job, position: int) -> Found:
    found = events.list_events(session=session, job_id=job.id, after=position)
    news = [News(one.id, one.kind.value, EventView.of(one).model_dump(mode="json")) for one in found]
    return Found(news, news[-1].position if news else position)


def _metrics(names: Sequence[str], since_step: int, session: Session, job: Job, position: int) -> Found:
    found, end = metrics.measured_after(
        session=session, job_id=job.id, names=names, after=position, since_step=since_step, limit=STEPS_PER_LOOK
    )
    return Found([News(one.position, "metrics", {"step": one.step, "values": one.values}) for one in found], end)


def _log(session: Session, job: Job, position: int) -> Found:
    text, end = logs.read_log(session=session, job_id=job.id, after=position, limit=CHUNKS_PER_LOOK)
    return Found([News(end, "log", {"text": text})] if end > position else [], end)
