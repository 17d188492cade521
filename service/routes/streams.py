"""What happens to a job and what it prints and measures: as lists, and as streams while it happens."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Header, Query, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from sqlalchemy.orm import Session

from service.auth import STILL_ALLOWED
from service.errors import problem_responses
from service.routes.dependencies import JobIdInPath, ServicesOf
from service.schemas import EventList, EventView
from service.store import events, jobs, logs, metrics
from service.store.models import Job
from service.store.session import reading
from service.streams import MEDIA_TYPE, Found, Look, News, Wanted

router = APIRouter(prefix="/jobs", tags=["jobs"])

STEPS_PER_LOOK = 500
CHUNKS_PER_LOOK = 16

_STREAM: dict[str, Any] = {MEDIA_TYPE: {}}  # OpenAPI 3.1 can't describe the events of a stream, only a body as a whole


def _wants_stream(accept: Annotated[str, Header(include_in_schema=False)] = "") -> bool:
    return MEDIA_TYPE in accept


WantsStream = Annotated[bool, Depends(_wants_stream)]
LastEventId = Annotated[int | None, Header(ge=0, lt=2**63, description="Of a stream: the `id` of the last event that arrived.")]


async def _follow(
    services: ServicesOf, request: Request, last_event_id: LastEventId = None
) -> Callable[[str, Look, int], Awaitable[Response]]:
    """Opens a stream about a job from a position on, or from where the client's last one broke off."""

    async def follow(job_id: str, look: Look, position: int) -> Response:
        is_resumed = last_event_id is not None
        start = position if last_event_id is None else last_event_id
        wanted = Wanted(job_id, look, start, is_resumed=is_resumed, still_allowed=getattr(request.state, STILL_ALLOWED))
        return await services.streams.open(services.sessions, wanted)

    return follow


Follow = Annotated[Callable[[str, Look, int], Awaitable[Response]], Depends(_follow)]


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
    after: Annotated[int, Query(ge=0, lt=2**63, description="Only events with a higher id.")] = 0,
    limit: Annotated[int, Query(ge=1, le=1000, description="Events, at most; a stream has all.")] = 100,
    follow: Follow,
) -> Response:
    """Events, oldest first; each was written together with the change it tells of. With `Accept: text/event-stream` they come as they
    happen, until the job ends: `event` is the kind, `id` serves to go on after a break, and the last one is `end` with the job's state.
    """
    if is_stream:
        return await follow(job_id, _events, after)

    def read() -> EventList:
        with reading(services.sessions) as session:
            jobs.get_job(session=session, job_id=job_id)
            return EventList.of(events.list_events(session=session, job_id=job_id, after=after, limit=limit))

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
    follow: Follow,
    job_id: JobIdInPath,
    names: Annotated[list[str], Query(max_length=256, description="As of the metric series.")] = ["*"],  # noqa: B006
    since_step: Annotated[int, Query(ge=0, lt=2**63, description="First step of interest.")] = 0,
) -> Response:
    """Events `metrics`, `{"step": …, "values": {name: value}}`, in the order of writing. A step is told again, with all that is known of
    it, when more of it becomes known: an evaluation's values come after the training's, and a resumed run measures the steps after its
    checkpoint again. The later event counts. The last one is `end` with the job's state."""
    look = partial(_metrics, [name.strip() for one in names for name in one.split(",")], since_step)
    return await follow(job_id, look, since_step)


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
    last_event_id: LastEventId = None,
    follow: Follow,
) -> Response:
    """What the training processes printed, over all attempts, and after each failed attempt why it failed; of a very long log the beginning
    is dropped. With `Accept: text/event-stream` it comes as events `log`, `{"text": …}`, while it is printed, until `end` with the job's
    state."""

    def start() -> int:
        with reading(services.sessions) as session:
            jobs.get_job(session=session, job_id=job_id)
            return 0 if tail is None else logs.tail_start(session=session, job_id=job_id, num_lines=tail)

    position = last_event_id if last_event_id is not None else await run_in_threadpool(start)
    if is_stream:
        return await follow(job_id, _log, position)

    def read() -> str:
        with reading(services.sessions) as session:
            jobs.get_job(session=session, job_id=job_id)
            return logs.read_log(session=session, job_id=job_id, after=position)[0]

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
