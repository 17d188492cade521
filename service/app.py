"""Builds the API: `uvicorn --factory service.app:create_app`."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.metadata import version
from typing import Any

from fastapi import FastAPI
from fastapi.concurrency import run_in_threadpool
from fastapi.openapi.utils import get_openapi
from prometheus_client import CollectorRegistry

from service.auth import OPEN_PATHS, Authorization
from service.errors import Problem, install_handlers, problem_responses
from service.logs import configure
from service.middleware import BodyLimit, ProblemsOnly
from service.monitoring import JobCollector, RequestMonitor
from service.queue import JobQueue
from service.routes import artifacts, control, health, jobs, streams, teacher_stores
from service.routes.dependencies import Services
from service.settings import Settings
from service.store.blobs import make_blobs
from service.store.session import make_engine, make_sessions, migrate
from service.streams import Streams

KEY_DESCRIPTION = (
    "An API key, made by `cliprd keys create`. Reading needs scope `read`, submitting and cancelling `submit`, deleting `admin`; each"
    " includes those before it. While no key was ever made, this machine's own requests pass without one (unless the service was told to"
    " need keys always), and no others do."
)


def create_app(settings: Settings | None = None) -> FastAPI:
    """The API. Nothing is connected or written before it starts.

    Args:
        settings: Left out: read from the environment.
    """
    services = _make_services(settings or Settings())
    app = FastAPI(title="cliprd", version=version("cliprd"), summary="Distils a large CLIP into a small one.", lifespan=_lifespan)
    app.state.services = services
    app.add_middleware(BodyLimit, max_bytes=services.settings.max_body_bytes)
    open_paths = OPEN_PATHS if services.settings.metrics_need_key else OPEN_PATHS | {"/metrics"}
    app.add_middleware(Authorization, sessions=services.sessions, open_paths=open_paths, always=services.settings.always_need_key)
    app.add_middleware(ProblemsOnly)
    app.add_middleware(RequestMonitor, registry=services.registry)
    install_handlers(app)
    for part in (jobs, control, streams, artifacts, teacher_stores, health):
        app.include_router(part.router)
    app.openapi = lambda: _openapi(app)  # type: ignore[method-assign]  # FastAPI's documented way to extend it
    return app


def _make_services(settings: Settings) -> Services:
    engine = make_engine(settings.database_url)
    sessions = make_sessions(engine)
    registry = CollectorRegistry()
    registry.register(JobCollector(sessions))
    return Services(
        registry=registry,
        settings=settings,
        engine=engine,
        sessions=sessions,
        blobs=make_blobs(settings.artifacts_url, settings.artifacts_root),
        queue=JobQueue(settings.broker_url, timeout_seconds=settings.broker_timeout_seconds),
        streams=Streams(
            max_open=settings.max_streams,
            poll_seconds=settings.stream_poll_seconds,
            heartbeat_seconds=settings.stream_heartbeat_seconds,
        ),
    )


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    services: Services = app.state.services
    configure(services.settings.log_format)
    if services.settings.migrate_on_start:
        await run_in_threadpool(migrate, services.settings.database_url)
    try:
        yield
    finally:
        services.queue.close()
        services.engine.dispose()


def _openapi(app: FastAPI) -> dict[str, Any]:
    """The routes' schema, with that of problems, which they refer to by name, in place of FastAPI's own error answers."""
    if app.openapi_schema is None:
        schema = get_openapi(title=app.title, version=app.version, summary=app.summary, routes=app.routes)
        problem = Problem.model_json_schema(ref_template="#/components/schemas/{model}")
        schemas = schema["components"]["schemas"]
        schemas |= {**problem.pop("$defs"), "Problem": problem}
        schema["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer", "description": KEY_DESCRIPTION}}
        for path, operation in ((path, one) for path, methods in schema["paths"].items() for one in methods.values()):
            if "application/json" in operation["responses"].get("422", {}).get("content", {}):
                del operation["responses"]["422"]
            if path not in OPEN_PATHS:
                operation["security"] = [{"key": []}, {}]
                refusals = {str(status): answer for status, answer in problem_responses(401, 403).items()}
                operation["responses"] = dict(sorted({**operation["responses"], **refusals}.items()))
        for unused in ("HTTPValidationError", "ValidationError"):
            schemas.pop(unused, None)
        app.openapi_schema = schema
    return app.openapi_schema
