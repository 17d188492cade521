"""What the API answers with about workers."""

from __future__ import annotations

from datetime import datetime
from typing import Self

from pydantic import Field

from service.schemas import View
from service.store.workers import WorkerState, WorkerStatus


class GpuView(View):
    """One GPU. Null: it does not tell."""

    index: int = Field(description="Among those that the worker sees.")
    uuid: str
    name: str
    utilization: float | None = Field(description="Fraction 0-1 of the last moments in which it computed anything.")
    memory_used_bytes: int | None = Field(description="By all processes, and by the driver itself.")
    memory_total_bytes: int | None
    temperature_celsius: float | None


class WorkerView(View):
    """A worker as it reported last."""

    id: str = Field(description="Machine, process, and something random; also the `worker` of its jobs.")
    host: str = Field(description="Its machine.")
    state: WorkerState = Field(
        description="`consuming`: it takes jobs of its queues; `not_consuming`: something keeps it from that; `lost`: it stopped reporting."
    )
    queues: list[str]
    problems: list[str] = Field(description="What keeps it from taking jobs.")
    job_id: str | None = Field(description="The job it works on.")
    gpus: list[GpuView]
    started_at: datetime
    heartbeat_at: datetime = Field(description="When it last reported.")

    @classmethod
    def of(cls, worker: WorkerStatus) -> Self:
        return cls.model_validate(worker, from_attributes=True)


class WorkerList(View):
    """All workers, by machine; one that vanished is listed for another hour."""

    workers: list[WorkerView]
