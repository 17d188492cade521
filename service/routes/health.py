"""For those who run the service: is the process up, and can it work?"""

from __future__ import annotations

from collections.abc import Callable

from fastapi import APIRouter
from fastapi.responses import PlainTextResponse, Response
from kombu.exceptions import KombuError
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from redis.exceptions import RedisError
from sqlalchemy.exc import SQLAlchemyError

from service.errors import NotReadyError, problem_responses
from service.problems import FieldProblem
from service.routes.dependencies import Services, ServicesOf
from service.schemas import Health
from service.store.session import check_database

router = APIRouter(tags=["health"])


@router.get("/healthz", summary="Is the process up?")
async def healthz() -> Health:  # not in a thread: those may all be waiting for the database
    """Answers as long as the process does."""
    return Health(status="ok")


@router.get("/readyz", summary="Can the service work?", responses=problem_responses(503))
def readyz(services: ServicesOf) -> Health:
    """Ready when the database has this version's schema, the broker answers, and artifacts can be written; 503 names what is not."""
    checks: dict[str, tuple[Callable[[Services], None], str]] = {
        "database": (_check_database, "Look at CLIPRD_DATABASE_URL and at the database's log."),
        "broker": (_check_broker, "Look at CLIPRD_BROKER_URL and at the broker's log. Jobs are stored meanwhile and sent later."),
        "artifacts_root": (
            _check_artifacts,
            "Make the folder of CLIPRD_ARTIFACTS_ROOT, or the bucket of CLIPRD_ARTIFACTS_URL, writable for this process.",
        ),
    }
    problems = []
    for part, (check, remedy) in checks.items():
        try:
            check(services)
        except (SQLAlchemyError, KombuError, RedisError, OSError) as error:
            first_line = next(iter(str(error).splitlines()), type(error).__name__)
            problems.append(FieldProblem(field=part, problem=first_line, remedy=remedy))
    if problems:
        raise NotReadyError(problems)
    return Health(status="ready")


@router.get(
    "/metrics",
    summary="Measurements for Prometheus",
    response_class=PlainTextResponse,
    responses={200: {"description": "Prometheus' text format", "content": {"text/plain": {}}}, **problem_responses(500, 503)},
)
def prometheus_metrics(services: ServicesOf) -> Response:
    """Jobs by state and queue, age of queues, attempts and lost ones, speed of running jobs, seconds of this API's answers."""
    return Response(generate_latest(services.registry), media_type=CONTENT_TYPE_LATEST)


def _check_database(services: Services) -> None:
    check_database(services.engine)


def _check_broker(services: Services) -> None:
    services.queue.check()


def _check_artifacts(services: Services) -> None:
    services.blobs.check_writable()
