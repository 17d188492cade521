"""Builds the API: `uvicorn --factory service.app:create_app`."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.metadata import version

from anyio import CapacityLimiter
from fastapi import FastAPI
from fastapi.concurrency import run_in_threadpool
from sqlalchemy import Engine

from service.auth import OPEN_PATHS, Authorization
from service.errors import install_handlers
from service.intake import Intake
from service.logs import configure
from service.messages import Messages
from service.middleware import HeadLikeGet, ProblemsOnly, RequestLimits, SecurityHeaders
from service.monitoring import RequestMonitor, make_registry
from service.openapi import DESCRIPTION, openapi_of
from service.preparation import MAX_CALLS, Preparation
from service.queue import JobQueue
from service.readiness import Part, Readiness
from service.routes import artifacts, control, docs, health, jobs, streams, teacher_stores, workers
from service.routes.dependencies import Services
from service.settings import Settings
from service.store.blobs import Blobs, make_blobs
from service.store.session import check_database, make_engine, make_sessions, migrate
from service.streams import Streams

MAX_DOWNLOAD_THREADS = 16
"""Each reads one chunk at a time, so that many more downloads go on at once."""


def create_app(settings: Settings | None = None) -> FastAPI:
    """The API. Nothing is connected or written before it starts.

    Args:
        settings: Left out: read from the environment.
    """
    services = _make_services(settings or Settings())
    app = FastAPI(
        title="cliprd",
        version=version("cliprd"),
        summary="Distils a large CLIP into a small one.",
        description=DESCRIPTION,
        generate_unique_id_function=lambda route: route.name,
        lifespan=_lifespan,
        openapi_url=None,  # routes/docs.py serves both
        docs_url=None,
        redirect_slashes=False,  # `/jobs/$ID` of an unset variable is no list
    )
    app.state.services = services
    app.add_middleware(HeadLikeGet)
    limits = services.settings
    app.add_middleware(RequestLimits, max_body_bytes=limits.max_body_bytes, max_header_bytes=limits.max_header_bytes)
    open_paths = OPEN_PATHS | docs.DOCS_PATHS | (set() if services.settings.metrics_need_key else {"/metrics"})
    app.add_middleware(Authorization, sessions=services.sessions, open_paths=open_paths, always=services.settings.always_need_key)
    app.add_middleware(ProblemsOnly)
    app.add_middleware(SecurityHeaders)
    app.add_middleware(RequestMonitor, registry=services.registry)
    install_handlers(app)
    for part in (jobs, control, streams, artifacts, teacher_stores, workers, health, docs):
        app.include_router(part.router)
    app.openapi = lambda: openapi_of(app)  # type: ignore[method-assign]  # FastAPI's documented way to extend it
    return app


def _make_services(settings: Settings) -> Services:
    engine = make_engine(settings.database_url)
    sessions = make_sessions(engine)
    queue = JobQueue(settings.broker_url, timeout_seconds=settings.broker_timeout_seconds)
    preparation, intake = Preparation(settings, sessions), Intake(sessions, max_attempts=settings.max_attempts)
    blobs = make_blobs(settings.artifacts_url, settings.artifacts_root, is_quick=True)  # its clients try again
    return Services(
        registry=make_registry(sessions),
        settings=settings,
        engine=engine,
        sessions=sessions,
        blobs=blobs,
        queue=queue,
        preparation=preparation,
        intake=intake,
        messages=Messages(queue, is_busy=lambda: preparation.is_busy or intake.is_busy),
        streams=Streams(
            max_open=settings.max_streams,
            poll_seconds=settings.stream_poll_seconds,
            heartbeat_seconds=settings.stream_heartbeat_seconds,
        ),
        readiness=_make_readiness(engine, queue, blobs),
        downloads=CapacityLimiter(MAX_DOWNLOAD_THREADS),
        file_looks=CapacityLimiter(MAX_CALLS),
    )


def _make_readiness(engine: Engine, queue: JobQueue, blobs: Blobs) -> Readiness:
    writable = "Make the folder of CLIPRD_ARTIFACTS_ROOT, or the bucket of CLIPRD_ARTIFACTS_URL, writable for this process."
    resent = "Look at CLIPRD_BROKER_URL and at the broker's log. Jobs are stored meanwhile and sent later."
    return Readiness(
        {
            "database": Part(lambda: check_database(engine), "Look at CLIPRD_DATABASE_URL and at the database's log."),
            "broker": Part(queue.check, resent),
            "artifacts_root": Part(blobs.check_writable, writable),
        }
    )


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    services: Services = app.state.services
    configure(services.settings.log_format)
    if services.settings.migrate_on_start:
        await run_in_threadpool(migrate, services.settings.database_url)
    try:
        yield
        await services.messages.drain()
    finally:
        services.queue.close()
        services.engine.dispose()
