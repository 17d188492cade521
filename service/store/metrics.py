"""What runs measured: metric series and evaluations."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import ColumnElement, false, func, select, tuple_
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.orm import Session

from cliprd_core.run_dir import EvaluationRecord, MetricsRecord
from service.store.cursors import Page, decode, encode
from service.store.events import EventKind, record_event
from service.store.leases import lock_held_job
from service.store.models import Base, Evaluation, Job, Metric, MetricStep
from service.store.rollups import MIN_POINTS, thinned, update_rollups
from service.store.session import database_now

__all__ = [
    "MAX_EVALUATIONS",
    "MIN_POINTS",
    "Measured",
    "Series",
    "list_evaluations",
    "measured_after",
    "newest_position",
    "record_evaluations",
    "record_metrics",
    "series",
    "unmatched",
]

MAX_EVALUATIONS = 1000
"""Of one page, at most."""


@dataclass(frozen=True)
class Series:
    """One metric over the steps of a run; both lists are equally long, steps ascending."""

    steps: list[int] = field(default_factory=list)
    values: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Measured:
    """What is known of one step."""

    position: int
    """Its place in the order of writing."""
    step: int
    values: dict[str, float]


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
    if rows:
        newest = select(func.max(MetricStep.step), func.max(MetricStep.position)).where(MetricStep.job_id == job_id)
        newest_step, position = session.execute(newest).one()
        written = _upsert(session, Metric, list(rows.values()), replace=("attempt", "value"))
        steps = {step for _, _, step in written}
        if written:
            update_rollups(
                session=session,
                job_id=job_id,
                names={name for _, name, _ in written},
                first_step=min(steps),
                last_step=max(steps),
                all_names=latest,
                newest_before=newest_step,
            )
        _put_last(session, job_id, position or 0, written=steps, known={step for _, step in rows})
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
    written = _upsert(session, Evaluation, list(rows.values()), replace=("attempt", "record"))
    now = database_now(session)
    for _, step, task, dataset in sorted(written):
        metrics = rows[step, task, dataset]["record"]["metrics"]
        record_event(job, EventKind.EVALUATED, now=now, step=step, task=task, dataset=dataset, metrics=metrics)


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


def measured_after(
    *, session: Session, job_id: str, names: Sequence[str], after: int, since_step: int = 0, limit: int
) -> tuple[list[Measured], int]:
    """What is known of the next `limit` steps that were written after position `after`, in the order of writing.

    A step that is written again (an evaluation's values come after the training's; a resumed run measures steps anew) is found again, at a
    higher position, with all that is known of it by then. Whoever goes on from the position that was returned misses nothing.

    Args:
        session: for reading.
        job_id: the job.
        names: as for `series`.
        after: a position that was returned before. Since they are higher than their steps, a first step of interest may begin it, too.
        since_step: the first step of interest.
        limit: steps that are looked at.

    Returns:
        Those of the steps that have values of these names, and up to which position was looked: `after` itself, where nothing is new.
    """
    query = select(MetricStep.position, MetricStep.step).where(MetricStep.job_id == job_id, MetricStep.position > after)
    page = session.execute(query.order_by(MetricStep.position).limit(limit)).all()
    if not page:
        return [], after
    # After the steps, or the names that a step brought could be missing here.
    known = session.scalar(select(Job.metrics).where(Job.id == job_id)) or {}
    wanted = [name for name in known if any(_matches(name, pattern) for pattern in names)]
    values: dict[int, dict[str, float]] = {step: {} for _, step in page if step >= since_step}
    rows = select(Metric.step, Metric.name, Metric.value).where(Metric.job_id == job_id, Metric.name.in_(wanted))
    for step, name, value in session.execute(rows.where(_is_one_of(session, job_id, values)).order_by(Metric.step, Metric.name)):
        if step in values:
            values[step][name] = value
    return [Measured(position, step, values[step]) for position, step in page if values.get(step)], page[-1].position


def newest_position(*, session: Session, job_id: str) -> int:
    """The highest position of a job's steps in the order of writing; 0 before the first."""
    return session.scalar(select(func.max(MetricStep.position)).where(MetricStep.job_id == job_id)) or 0


def _is_one_of(session: Session, job_id: str, steps: Collection[int]) -> ColumnElement[bool]:
    """Whether a metric is of one of these steps, or of hardly any other ones between them: a range is read much faster than a list."""
    if not steps:
        return false()
    first, last = min(steps), max(steps)
    all_between = select(func.count()).where(MetricStep.job_id == job_id, MetricStep.step.between(first, last))
    is_dense = session.execute(all_between).scalar_one() <= 2 * len(steps)
    return Metric.step.between(first, last) if is_dense else Metric.step.in_(steps)


def _matches(name: str, pattern: str) -> bool:
    return name.startswith(pattern[:-1]) if pattern.endswith("*") else name == pattern


def _put_last(session: Session, job_id: str, last: int, *, written: Collection[int], known: Collection[int]) -> None:
    """Put the steps `written` last in the order of writing, behind position `last`. The caller holds the job's lock, so what a reader sees
    of it never gets a row before one that was seen. Of `known`, those without a place get one, too: a worker of an older version gave them
    none."""
    of_job = MetricStep.job_id == job_id
    placed = set(session.scalars(select(MetricStep.step).where(of_job, MetricStep.step.between(min(known), max(known)))))
    rows = []
    for step in sorted({*written, *known} - (placed - set(written))):
        last = max(last, step) + 1
        rows.append({"job_id": job_id, "step": step, "position": last})
    if rows:
        insert = _dialect(session).insert(MetricStep)
        keys = list(MetricStep.__table__.primary_key)
        statement = insert.on_conflict_do_update(index_elements=keys, set_={"position": insert.excluded.position})
        session.connection().execute(statement, rows)


def _upsert(session: Session, table: type[Base], rows: list[dict[str, Any]], *, replace: tuple[str, ...]) -> set[tuple[Any, ...]]:
    """Insert rows, or replace those of an earlier attempt; the primary keys of those rows. All others are replays."""
    if not rows:
        return set()
    insert = _dialect(session).insert(table)
    keys = list(table.__table__.primary_key)
    statement = insert.on_conflict_do_update(
        index_elements=keys,
        set_={column: insert.excluded[column] for column in replace},
        where=table.__table__.c.attempt < insert.excluded.attempt,
    )
    return {tuple(row) for row in session.connection().execute(statement.returning(*keys), rows)}


def _dialect(session: Session) -> Any:
    return postgresql if session.get_bind().dialect.name == "postgresql" else sqlite
