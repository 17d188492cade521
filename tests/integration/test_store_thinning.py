"""Thinning of long series by rollups, on SQLite and PostgreSQL, against a plain reckoning of the same."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
from alembic.operations import Operations
from alembic.runtime.migration import MigrationContext
from sqlalchemy import Engine, text

from service.store import jobs
from service.store.metrics import MIN_POINTS, record_metrics
from service.store.migrations.versions import v0004_keys_and_rollups
from service.store.models import MetricRollup
from service.store.rollups import WIDTHS, Point, thinned
from service.store.session import reading
from tests.store_helpers import Sessions, claim, create, measured

NAME = "train/loss"


@pytest.fixture
def claimed(sessions: Sessions) -> jobs.Claim:
    return claim(sessions, create(sessions).id)


def record(sessions: Sessions, claimed: jobs.Claim, points: Sequence[Point], attempt: int = 1) -> None:
    records = [measured(step, attempt, train_loss=value, train_lr=-value) for step, value in points]
    with sessions.begin() as session:
        record_metrics(session=session, job_id=claimed.job.id, lease_token=claimed.lease_token, records=records)


def thin(sessions: Sessions, claimed: jobs.Claim, max_points: int, since_step: int = 0) -> list[Point]:
    with reading(sessions) as session:
        return thinned(session=session, job_id=claimed.job.id, name=NAME, since_step=since_step, max_points=max_points)


def reckoned(points: Sequence[Point], max_points: int, since_step: int = 0) -> list[Point]:
    """The same without a database and without rollups; only which ranges are taken is agreed on."""
    whole = [point for point in points if point[0] >= since_step]
    if len(whole) <= max_points:
        return whole
    first, last, count = whole[0][0], whole[-1][0], (max_points - 2) // 2
    unit = max((width for width in WIDTHS if width * count <= last - first + 1), default=1)
    origin = first - first % unit
    width = next(width for width in range(unit, 2 * last + 2 * unit, unit) if origin + count * width > last)
    kept = {whole[0], whole[-1]}
    for start in range(origin, last + 1, width):
        inside = [point for point in whole if start <= point[0] < start + width]
        if inside:
            kept |= {min(inside, key=lambda point: (point[1], point[0])), min(inside, key=lambda point: (-point[1], point[0]))}
    return sorted(kept)


@pytest.mark.parametrize("seed", range(3))
def test_it_is_what_a_plain_reckoning_gives(sessions: Sessions, claimed: jobs.Claim, seed: int) -> None:
    chance = random.Random(seed)
    every = chance.choice([1, 1, 7])
    steps = [step for step in range(chance.randrange(50), 3000 * every, every) if chance.random() < 0.9]
    points = [(step, float(chance.randrange(40))) for step in steps]  # with many equals
    for start in range(0, len(points), 700):
        record(sessions, claimed, points[start : start + 700])
    for _ in range(25):
        max_points, since_step = chance.choice([4, 5, 7, 20, 100, 399, 2900]), chance.choice([0, chance.randrange(steps[-1] + 2)])
        found = thin(sessions, claimed, max_points, since_step)
        assert found == reckoned(points, max_points, since_step), (max_points, since_step)
        assert len(found) <= max_points
        assert thin(sessions, claimed, max_points, since_step) == found


def test_a_later_attempt_replaces_what_it_repeats_in_the_rollups_too(sessions: Sessions, claimed: jobs.Claim) -> None:
    first = [(step, 5.0) for step in range(2000)]
    first[1000], first[1500] = (1000, 99.0), (1500, -99.0)
    record(sessions, claimed, first)
    again = [(step, 6.0) for step in range(900, 1200)]
    record(sessions, claimed, again, attempt=2)
    record(sessions, claimed, first[:1100])  # a late replay of the first attempt
    now = first[:900] + again + first[1200:]
    for max_points in (4, 20, 100):
        found = thin(sessions, claimed, max_points)
        assert found == reckoned(now, max_points)
        assert (1000, 99.0) not in found
        assert (1500, -99.0) in found


@pytest.mark.parametrize("seed", range(4))
def test_it_is_that_however_the_series_came_about(sessions: Sessions, claimed: jobs.Claim, seed: int) -> None:
    """In leaps, seldom, from the start again; two metrics, of which one leads the other past the next width of rollups."""
    chance = random.Random(seed)
    now: dict[str, dict[int, float]] = {"train_loss": {}, "train_lr": {}}
    step = 0
    for attempt in range(1, 15):
        records = []
        for _ in range(chance.choice([1, 1, 5, 40, 200])):
            for name in chance.choice([["train_loss"], ["train_lr"], ["train_loss", "train_lr"]]):
                now[name][step] = float(chance.randrange(40))
                records.append(measured(step, attempt, **{name: now[name][step]}))
            step += chance.choice([1, 1, 1, 9])
        with sessions.begin() as session:
            record_metrics(session=session, job_id=claimed.job.id, lease_token=claimed.lease_token, records=records)
        for name, values in now.items():
            points = sorted(values.items())
            for max_points in (4, 6, 20, 100) if points else ():
                with reading(sessions) as session:
                    metric = name.replace("_", "/")
                    found = thinned(session=session, job_id=claimed.job.id, name=metric, since_step=0, max_points=max_points)
                assert found == reckoned(points, max_points), (name, max_points)
        step = chance.choice([step, step, step + chance.randrange(300), chance.randrange(step)])


def test_ends_and_extremes_of_each_range_stay_and_of_equals_the_earliest(sessions: Sessions, claimed: jobs.Claim) -> None:
    record(sessions, claimed, list(enumerate([0.0, 5, 1, 9, 5, 5, 5, 2, 7, 0])))
    # 2 ranges of 5: [0 5 1 9 5] and [5 5 2 7 0].
    assert thin(sessions, claimed, 6) == [(0, 0.0), (3, 9.0), (8, 7.0), (9, 0.0)]
    assert thin(sessions, claimed, 10) == list(enumerate([0.0, 5, 1, 9, 5, 5, 5, 2, 7, 0]))
    assert thin(sessions, claimed, 4, since_step=3) == [(3, 9.0), (9, 0.0)]


def test_fewer_than_four_points_can_not_be_asked_for(sessions: Sessions, claimed: jobs.Claim) -> None:
    with pytest.raises(ValueError, match="fewer than 4"):
        thin(sessions, claimed, MIN_POINTS - 1)


def test_migrating_an_older_database_makes_its_rollups(sessions: Sessions, claimed: jobs.Claim, engine: Engine) -> None:
    points = [(step, float(step * 37 % 101)) for step in range(1500)]
    record(sessions, claimed, points)
    with engine.begin() as connection:
        written = connection.execute(text("SELECT * FROM metric_rollups ORDER BY name, width, bucket")).all()
        for undone in ("DROP TABLE metric_rollups", "DROP TABLE api_keys", "ALTER TABLE jobs DROP COLUMN num_lost"):
            connection.execute(text(undone))
        with Operations.context(MigrationContext.configure(connection)):
            v0004_keys_and_rollups.upgrade()
        made = connection.execute(text("SELECT * FROM metric_rollups ORDER BY name, width, bucket")).all()
        width = list(MetricRollup.__table__.c.keys()).index("width")
        assert [row for row in made if row[width] <= len(points)] == written, "wider ones no longer are, until they are of use"
