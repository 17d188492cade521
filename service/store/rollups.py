"""Long series in few points, at a cost that doesn't grow with their length.

Beside its values, a series has rollups: for every aligned range of 16, 64, 256, … steps the point with its lowest and the point with its
highest value, kept up by whoever writes values. A read asks for ranges of equal width, of at least as many steps as the next finer rollup:
it looks at four rollups at most for each range that it returns, however many values there are.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from functools import cache
from typing import Any

from sqlalchemy import BigInteger, BindParameter, ColumnElement, Select, String, bindparam, case, func, literal, or_, select, union_all
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.orm import Session
from sqlalchemy.sql.dml import Insert
from sqlalchemy.sql.selectable import CTE

from service.store.models import Metric, MetricRollup

WIDTHS = tuple(4**power for power in range(2, 11))
"""Steps of one rollup, per level: 16 to about a million, each four of the level below."""

MIN_POINTS = 4
"""The fewest points a series can be thinned to: its ends, and the lowest and highest between them."""

Point = tuple[int, float]
"""Step and value."""


@dataclass(frozen=True)
class _Ranges:
    """Equal ranges of steps that a series is cut into."""

    origin: int
    """First step of the first one."""
    width: int
    """Steps of each."""
    level: int
    """Width of the rollups that they are made of; 1: of the values themselves."""


def update_rollups(
    *,
    session: Session,
    job_id: str,
    names: Collection[str],
    first_step: int,
    last_step: int,
    all_names: Collection[str],
    newest_before: int | None,
) -> None:
    """Make the rollups of these steps again, after values there were written. The caller holds the job's lock.

    A job has those that are no wider than its steps are many, as no wider ones are read; all its metrics get them when it gets so far.

    Args:
        session: The database's.
        job_id: The job.
        names: The metrics that were written.
        first_step: The first step of which any was written.
        last_step: The last one.
        all_names: Of all the job's metrics.
        newest_before: The highest step that the job had before; None: none.
    """
    is_postgresql = session.get_bind().dialect.name == "postgresql"
    num_before = 0 if newest_before is None else newest_before + 1
    for level, width in enumerate(WIDTHS):
        if width > max(num_before, last_step + 1):
            return
        is_new = width > num_before  # then all that was before is in the first one
        below = 1 if level == 0 else WIDTHS[level - 1]
        start, end = 0 if is_new else first_step // width * width, (last_step // width + 1) * width
        values = {"of_job": job_id, "of_names": list(all_names if is_new else names), "start": start // below, "end": end // below}
        session.connection().execute(_roll_up(is_postgresql, width, below), values)


def thinned(*, session: Session, job_id: str, name: str, since_step: int, max_points: int) -> list[Point]:
    """At most `max_points` (at least 4) points of a series from `since_step` on, by step, the same ones every time.

    All, where there are no more. Else the first and the last, and of each of `(max_points - 2) // 2` ranges of equally many steps the
    lowest and the highest (among equals the earliest), so that no spike is lost.
    """
    if max_points < MIN_POINTS:
        raise ValueError(f"max_points is {max_points}; a series can't be thinned to fewer than {MIN_POINTS} points")
    whole = select(Metric.step, Metric.value).where(Metric.job_id == job_id, Metric.name == name, Metric.step >= since_step)
    has_more = select(whole.with_only_columns(Metric.step).order_by(Metric.step).offset(max_points).limit(1).exists())
    if not session.execute(has_more).scalar_one():
        return [(row.step, row.value) for row in session.execute(whole.order_by(Metric.step))]
    first, last = (session.execute(whole.order_by(order).limit(1)).one() for order in (Metric.step, Metric.step.desc()))
    ranges = _ranges(first.step, last.step, (max_points - 2) // 2)
    head_end = -(-max(since_step, ranges.origin) // ranges.level) * ranges.level  # where `since_step` cuts a rollup, values take its place
    values = {
        **{"of_job": job_id, "of_names": [name], "origin": ranges.origin, "width": ranges.width},
        **{"head_start": since_step, "head_end": head_end, "start": head_end // ranges.level, "end": last.step // ranges.level + 1},
    }
    found = {row.step: row.value for row in session.execute(_extremes(ranges.level), values)}
    return sorted((found | {first.step: first.value, last.step: last.value}).items())


def _ranges(first: int, last: int, count: int) -> _Ranges:
    """At most `count` ranges that cover the steps, aligned with the widest rollups that are no wider than they."""
    level = max((width for width in WIDTHS if width * count <= last - first + 1), default=1)
    origin = first // level * level
    width = -(-(last - origin + 1) // (count * level)) * level
    return _Ranges(origin, width, level)


# The statements are built once: that takes longer than running them.


@cache
def _extremes(level: int) -> Select[Any]:
    """The lowest and the highest point of each range of `width` steps from `origin` on."""
    points = union_all(select(_points(1, "head_start", "head_end")), select(_points(level, "start", "end"))).cte("candidates")
    ranked = _ranked(points, (points.c.step - _integer("origin")) // _integer("width"))
    return select(ranked.c.step, ranked.c.value).where(or_(ranked.c.low == 1, ranked.c.high == 1))


@cache
def _roll_up(is_postgresql: bool, width: int, below: int) -> Insert:
    """Insert the rollups of `width` steps, made of those `below`, or replace them."""
    points = _points(below, "start", "end")
    ranked = _ranked(points, points.c.step // literal(width, BigInteger))
    extremes = {
        f"{rank}_{column}": func.max(case((ranked.c[rank] == 1, ranked.c[column])))
        for rank in ("low", "high")
        for column in ("step", "value")
    }
    key = {"job_id": bindparam("of_job", type_=String), "name": ranked.c.name, "width": literal(width), "bucket": ranked.c.bucket}
    columns = [value.label(name) for name, value in (key | extremes).items()]
    insert = (postgresql if is_postgresql else sqlite).insert(MetricRollup)
    rows = insert.from_select([*key, *extremes], select(*columns).group_by(ranked.c.name, ranked.c.bucket))
    statement: Insert = rows.on_conflict_do_update(index_elements=list(key), set_={name: insert.excluded[name] for name in extremes})
    return statement


def _points(level: int, start: str, end: str) -> CTE:
    """Points (name, step, value) of the steps from `start` to before `end`, both counted in `level` steps, which are parameters like
    `of_job` and `of_names`: all values for level 1, else the extremes that the rollups of a level hold."""
    table, position = (Metric, Metric.step) if level == 1 else (MetricRollup, MetricRollup.bucket)
    here = [
        table.job_id == bindparam("of_job", type_=String),
        table.name.in_(bindparam("of_names", expanding=True, type_=String)),
        position >= _integer(start),
        position < _integer(end),
    ]
    if level == 1:
        return select(Metric.name, Metric.step, Metric.value).where(*here).cte()
    here.append(MetricRollup.width == level)
    low = select(MetricRollup.name, MetricRollup.low_step.label("step"), MetricRollup.low_value.label("value")).where(*here)
    high = select(MetricRollup.name, MetricRollup.high_step.label("step"), MetricRollup.high_value.label("value")).where(*here)
    return union_all(low, high).cte()


def _ranked(points: CTE, bucket: ColumnElement[Any]) -> CTE:
    """The points with their place by value in their bucket: `low` and `high` are 1 for the lowest and the highest."""
    numbered = select(points.c.name, points.c.step, points.c.value, bucket.label("bucket")).cte()
    within = (numbered.c.name, numbered.c.bucket)
    low = func.row_number().over(partition_by=within, order_by=(numbered.c.value, numbered.c.step)).label("low")
    high = func.row_number().over(partition_by=within, order_by=(numbered.c.value.desc(), numbered.c.step)).label("high")
    return select(numbered, low, high).cte()


def _integer(name: str) -> BindParameter[int]:
    return bindparam(name, type_=BigInteger)
