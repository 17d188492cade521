"""For those who run the service: is the process up, and can it work?"""

from __future__ import annotations

from fastapi import APIRouter
from fastapi.responses import PlainTextResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from service.errors import NotReadyError, problem_responses
from service.routes.dependencies import ServicesOf
from service.schemas import Health
from service.strict_query import StrictRoute

router = APIRouter(tags=["health"], route_class=StrictRoute)


@router.get("/healthz", summary="Is the process up?")
async def healthz() -> Health:  # not in a thread: those may all be waiting for the database
    """Answers as long as the process does."""
    return Health(status="ok")


@router.get("/readyz", summary="Can the service work?", responses=problem_responses(503))
async def readyz(services: ServicesOf) -> Health:  # as above
    """Ready when the database has this version's schema, the broker answers, and artifacts can be written; 503 names what is not. One look,
    of 3 seconds at most, serves all who ask within the next 5, or 1 if it failed."""
    problems = await services.readiness.problems()
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
