"""How fast jobs trained, as they recorded it: for estimates of jobs that are like them."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import median
from typing import Any, NamedTuple

from sqlalchemy import select
from sqlalchemy.orm import Session

from cliprd_core.spec import Device, JobSpec
from service.store.models import Job, Metric

SPEED_METRIC = "train/samples_per_second"
MAX_JOBS_COMPARED = 500
"""The newest jobs that have trained: it bounds what one question reads."""
MAX_JOBS_USED = 5
"""The newest of those that are like the one in question, for each device."""
MAX_VALUES = 1000
"""The newest records of a job's speed."""


class RecordedSpeed(NamedTuple):
    """Pairs a second over all processes on one kind of device; each job's is the median of its newest records."""

    device: str
    median: float
    slowest: float
    fastest: float
    job_ids: tuple[str, ...]


def recorded_speeds(*, session: Session, spec: JobSpec) -> list[RecordedSpeed]:
    """Of the newest jobs that compute what `spec` asks for in each step, on devices that it may run on; the newest job's device first."""
    key = _speed_key(spec.model_dump(mode="json"))
    query = select(Job.id, Job.spec, Job.progress).where(Job.progress.is_not(None))
    alike: dict[str, list[str]] = {}
    for job_id, other, progress in session.execute(query.order_by(Job.created_at.desc(), Job.id).limit(MAX_JOBS_COMPARED)):
        device = progress.get("device")
        if device is not None and _may_run_on(spec.resources.device, device) and _speed_key(other) == key:
            alike.setdefault(device, []).append(job_id)
    found = (_of_device(session, device, job_ids[:MAX_JOBS_USED]) for device, job_ids in alike.items())
    return [speed for speed in found if speed is not None]


def _of_device(session: Session, device: str, job_ids: list[str]) -> RecordedSpeed | None:
    speeds = {job_id: median(values) for job_id in job_ids if (values := _values(session, job_id))}
    if not speeds:
        return None
    return RecordedSpeed(device, median(speeds.values()), min(speeds.values()), max(speeds.values()), tuple(speeds))


def _values(session: Session, job_id: str) -> list[float]:
    query = select(Metric.value).where(Metric.job_id == job_id, Metric.name == SPEED_METRIC, Metric.value > 0)
    return list(session.scalars(query.order_by(Metric.step.desc()).limit(MAX_VALUES)))


def _may_run_on(asked: Device, device: str) -> bool:
    return asked is Device.AUTO or (device == "cpu") == (asked is Device.CPU)


def _speed_key(spec: Mapping[str, Any]) -> tuple[Any, ...]:
    """What the time of a step depends on, beside the device. Specs of other versions may lack what this one has."""
    training, data = spec.get("training", {}), spec.get("data", {})
    objective = {name: bool(value) if isinstance(value, int | float) else value for name, value in spec.get("objective", {}).items()}
    return (
        _architecture(spec.get("student")),
        [_architecture(teacher) for teacher in [spec.get("teacher"), *spec.get("teachers", [])]],
        objective,
        bool(data.get("teacher_views")),
        *(training.get(name) for name in ("global_batch_size", "micro_batch_size", "precision", "compile")),
        spec.get("resources", {}).get("num_processes"),
    )


def _architecture(model: Mapping[str, Any] | None) -> dict[str, Any] | None:
    return None if model is None else {name: value for name, value in model.items() if name != "pretrained"}
