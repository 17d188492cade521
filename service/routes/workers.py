"""Workers: which there are, and how they are."""

from __future__ import annotations

from fastapi import APIRouter

from service.errors import problem_responses
from service.routes.dependencies import ServicesOf
from service.store.session import reading
from service.store.workers import list_workers as read_workers
from service.strict_query import StrictRoute
from service.worker_schemas import WorkerList, WorkerView

router = APIRouter(prefix="/workers", tags=["workers"], route_class=StrictRoute)


@router.get("", summary="List workers", responses=problem_responses(500, 503))
def list_workers(services: ServicesOf) -> WorkerList:
    """Every worker that reports to this service's database: its queues, what it works on, its GPUs, and what keeps it from working."""
    with reading(services.sessions) as session:
        return WorkerList(workers=[WorkerView.of(worker) for worker in read_workers(session=session)])
