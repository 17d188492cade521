"""What runs measured: metric series and evaluations."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import select, tuple_
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.orm import Session

from cliprd_core.run_dir import EvaluationRecord, MetricsRecord
from service.store.cursors import Page, decode, encode
from service.store.events import EventKind, record_event
from service.store.leases import lock_held_job
from service.store.models import Base, Evaluation, Job, Metric
from service.store.rollups import MIN_POINTS, thinned, update_rollups
from service.store.session import database_now

__all__ = ["MAX_EVALUATIONS", "MIN_POINTS", "Series", "list_evaluations", "record_evaluations", "record_metrics", "series", "unmatched"]

MAX_EVALUATIONS = 1000
"""Of one page, at most."""


@dataclass(frozen=True)
class Series:
    """One metric over the steps of a run; both lists are equally long, steps ascending."""

    steps: list[int] = field(default_factory=list)
    values: list[float] = field(default_factory=list)


def record_metrics(*, session: Session, job_id: str, lease_token: str, records: Sequence[MetricsRecord]) -> None:
    """Store records in the order they were made; the last one's progress, and every name's last value, show on the job.

    Replaying records changes nothing. Where attempts overlap, the latest attempt's value stays. Those of an attempt before the running
    one, which its worker's files still hold, complete the series; what the job shows of itself they set only where there is nothing.

    Raises:
        LeaseLostError: the token no longer holds the job.
        ValueError: a value is not a finite number.
    """
    job = lock_held_job(session=session, job_id=job_id, lease_token=lease_token)
    if not records:
        return
    rows: dict[tuple[str, int], dict[str, Any]] = {}
    latest = dict(job.metrics or {})
    for record in records:
        for name, value in record.values.items():
            if not math.isfinite(value):
                raise ValueError(f"metric {name!r} at step {record.step} is {value}; only finite numbers are recorded")
            row = {"job_id": job_id, "name": name, "step": record.step, "attempt": record.attempt, "value": value}
            earlier = rows.get((name, record.step))
            if earlier is None or record.attempt >= earlier["attempt"]:
                rows[name, record.step] = row
        latest = {**latest, **record.values} if record.attempt >= job.attempt else {**record.values, **latest}
    _upsert(session, Metric, list(rows.values()), replace=("attempt", "value"))
    if rows:
        names, steps = {name for name, _ in rows}, [step for _, step in rows]
        update_rollups(session=session, job_id=job_id, names=names, first_step=min(steps), last_step=max(steps))
    job.metrics = latest
    if job.progress is None or records[-1].attempt >= job.attempt:
        job.progress = records[-1].progress.model_dump(mode="json")


def record_evaluations(*, session: Session, job_id: str, lease_token: str, records: Sequence[EvaluationRecord]) -> None:
    """Store evaluations; replays and overlapping attempts are treated as in `record_metrics`.

    Raises:
        LeaseLostError: the token no longer holds the job.
    """
    job = lock_held_job(session=session, job_id=job_id, lease_token=lease_token)
    rows: dict[tuple[int, str, str], dict[str, Any]] = {}
    for record in sorted(records, key=lambda record: record.attempt):
        key = {"job_id": job_id, "step": record.step, "task": record.task, "dataset": record.dataset}
        rows[record.step, record.task, record.dataset] = {**key, "attempt": record.attempt, "record": record.model_dump(mode="json")}
    known = select(Evaluation.step, Evaluation.task, Evaluation.dataset, Evaluation.attempt)
    known = known.where(Evaluation.job_id == job_id, Evaluation.step.in_({step for step, _, _ in rows}))
    attempts = {(step, task, dataset): attempt for step, task, dataset, attempt in session.execute(known)}
    _upsert(session, Evaluation, list(rows.values()), replace=("attempt", "record"))
    now = database_now(session)
    for (step, task, dataset), row in sorted(rows.items()):
        if row["attempt"] > attempts.get((step, task, dataset), 0):  # else it is a replay
            record_event(job, EventKind.EVALUATED, now=now, step=step, task=task, dataset=dataset, metrics=row["record"]["metrics"])


def list_evaluations(*, session: Session, job_id: str, limit: int = MAX_EVALUATIONS, cursor: str | None = None) -> Page[EvaluationRecord]:
    """A page of a job's evaluations by step, task and data set.

    Raises:
        InvalidCursorError: the cursor was not made here.
    """
    position = (Evaluation.step, Evaluation.task, Evaluation.dataset)
    query = select(Evaluation).where(Evaluation.job_id == job_id).order_by(*position).limit(limit + 1)
    if cursor is not None:
        query = query.where(tuple_(*position) > tuple(decode(cursor, Evaluation.__name__, int, str, str)))
    found = session.scalars(query).all()
    last = found[limit - 1] if len(found) > limit else None
    next_cursor = None if last is None else encode(Evaluation.__name__, last.step, last.task, last.dataset)
    return Page([EvaluationRecord.model_validate(one.record) for one in found[:limit]], next_cursor)


def series(*, session: Session, job: Job, names: Sequence[str] = ("*",), since_step: int = 0, max_points: int = 1000) -> dict[str, Series]:
    """The job's metrics from `since_step` on whose names match, each thinned to at most `max_points`.

    Args:
        session: for reading.
        job: as `get_job` returned it.
        names: exact names, or prefixes that end in `*`.
        since_step: the first step of interest.
        max_points: at least 4; see `rollups.thinned`.

    Returns:
        A series for every metric of that name, sorted by name; one without points in range is empty.
    """
    found: dict[str, Series] = {}
    for name in sorted(job.metrics or {}):
        if any(_matches(name, pattern) for pattern in names):
            points = thinned(session=session, job_id=job.id, name=name, since_step=since_step, max_points=max_points)
            found[name] = Series([step for step, _ in points], [value for _, value in points])
    return found


def unmatched(job: Job, names: Sequence[str]) -> list[str]:
    """Those of `names`, as for `series`, that are the job's no metric's name, each once."""
    return [pattern for pattern in dict.fromkeys(names) if not any(_matches(name, pattern) for name in job.metrics or {})]


def steps_after(*, session: Session, job: Job, names: Sequence[str], after: int, limit: int) -> dict[int, dict[str, float]]:
    """What was measured at the next `limit` steps after step `after`, by step in order, of metrics whose names match."""
    found = [name for name in job.metrics or {} if any(_matches(name, pattern) for pattern in names)]
    is_wanted = (Metric.job_id == job.id, Metric.name.in_(found), Metric.step > after)
    last = session.scalars(select(Metric.step).where(*is_wanted).distinct().order_by(Metric.step).limit(limit)).all()
    if not last:
        return {}
    by_step: dict[int, dict[str, float]] = {step: {} for step in last}
    rows = select(Metric.step, Metric.name, Metric.value).where(*is_wanted, Metric.step <= last[-1]).order_by(Metric.step, Metric.name)
    for step, name, value in session.execute(rows):
        by_step.setdefault(step, {})[name] = value
    return by_step


def _matches(name: str, pattern: str) -> bool:
    return name.startswith(pattern[:-1]) if pattern.endswith("*") else name == pattern


def _upsert(session: Session, table: type[Base], rows: list[dict[str, Any]], *, replace: tuple[str, ...]) -> None:
    """Insert rows, or replace those of the same or an earlier attempt."""
    if not rows:
        return
    dialect = postgresql if session.get_bind().dialect.name == "postgresql" else sqlite
    insert = dialect.insert(table)
    statement = insert.on_conflict_do_update(
        index_elements=list(table.__table__.primary_key),
        set_={column: insert.excluded[column] for column in replace},
        where=table.__table__.c.attempt <= insert.excluded.attempt,
    )
    session.connection().execute(statement, rows)
