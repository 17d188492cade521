"""Clocks that are set while jobs train: the workers', or the database's. The monotonic clock goes on, as it does on a machine."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from email.utils import parsedate_to_datetime
from pathlib import Path

import httpx
import psycopg

from tests.chaos.lab import Bench, Lab, SkippedError
from tests.chaos.scenario import scenario
from tests.live import eventually

HOUR = 3600
SLEEP_FOLDER = Path(__file__).parents[1] / "wall_clock"
OFFSET = "clock-offset"


def library() -> Path:
    """libfaketime for programs with threads.

    Raises:
        SkippedError: it is not installed.
    """
    found = next(Path("/usr/lib").glob("**/faketime/libfaketimeMT.so.1"), None)
    if found is None:
        raise SkippedError("libfaketime is not installed (`apt-get install faketime`)")
    return found


def set_clock(offset: Path, seconds: int) -> None:
    """How far the clock of whoever runs with `movable_clock(offset)` is from the true one."""
    offset.write_text(f"{seconds:+d}s\n")
    offset.chmod(0o644)


def movable_clock(offset: Path) -> dict[str, str]:
    """The environment of a process whose clock follows a file."""
    set_clock(offset, 0)
    return {
        "LD_PRELOAD": str(library()),
        "FAKETIME_TIMESTAMP_FILE": str(offset),
        "FAKETIME_NO_CACHE": "1",
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",
    }


def worker_clock(bench: Bench) -> Mapping[str, str]:
    """For API, workers and training processes."""
    paths = [str(SLEEP_FOLDER), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    return movable_clock(bench.folder / OFFSET) | {"PYTHONPATH": os.pathsep.join(path for path in paths if path)}


@contextmanager
def database_clock(bench: Bench, _home: Path) -> Iterator[None]:
    """PostgreSQL with a clock that can be set."""
    offset = bench.postgres.socket.parent / OFFSET
    environment = movable_clock(offset)
    offset.chmod(0o644)
    bench.postgres.control("stop", "-m", "fast")
    bench.postgres.control("start", environment=environment)
    try:
        yield
    finally:
        bench.postgres.control("stop", "-m", "fast")
        bench.postgres.control("start")
        offset.unlink()


def api_clock(lab: Lab) -> float:
    """What time it is for the API, in Unix seconds."""
    return parsedate_to_datetime(httpx.get(f"{lab.stack.url}/healthz", timeout=30.0, trust_env=False).headers["Date"]).timestamp()


def postgres_clock(lab: Lab) -> float:
    """What time it is for PostgreSQL, in Unix seconds."""
    with psycopg.connect(lab.bench.postgres.url) as connection:
        row = connection.execute("SELECT extract(epoch FROM clock_timestamp())").fetchone()
    assert row is not None
    return float(row[0])


def jump(lab: Lab, offset: Path, clock: Callable[[Lab], float], seconds: int) -> None:
    """Set the clock while one job trains and another is queued. It takes no job from a worker that is well."""
    running = lab.train_to_checkpoint()
    idle = lab.other(lab.holder(running))
    idle.child.stop()
    queued = lab.train()
    set_clock(offset, seconds)
    lab.struck(queued)
    eventually(lambda: abs(clock(lab) - time.time() - seconds) < 10 or None)
    idle.child.start()
    for job_id in (running, queued):
        assert lab.finish(job_id).attempt == 1, "a job was taken from a worker that was well"


@scenario("clock-forward", "the clocks of API, workers and training processes jump forward by an hour", settings=worker_clock)
def clock_forward(lab: Lab) -> None:
    jump(lab, lab.bench.folder / OFFSET, api_clock, HOUR)


@scenario("clock-back", "the clocks of API, workers and training processes jump back by an hour", settings=worker_clock)
def clock_back(lab: Lab) -> None:
    jump(lab, lab.bench.folder / OFFSET, api_clock, -HOUR)


@scenario("database-clock-forward", "PostgreSQL's clock jumps forward by an hour: all leases have run out", around=database_clock)
def database_clock_forward(lab: Lab) -> None:
    jump(lab, lab.bench.postgres.socket.parent / OFFSET, postgres_clock, HOUR)


@scenario(
    "database-clock-forward-idle",
    "PostgreSQL's clock jumps forward by an hour; another worker is awake and idle",
    around=database_clock,
)
def database_clock_forward_idle(lab: Lab) -> str:
    job_id = lab.train_to_checkpoint()
    set_clock(lab.bench.postgres.socket.parent / OFFSET, HOUR)
    lab.struck(job_id)
    lab.finish(job_id)
    assert abs(postgres_clock(lab) - time.time() - HOUR) < 10, "the clock did not jump"
    assert lab.client.job(job_id).attempt == 1, "a job that trains on was taken from its worker"
    return "its worker kept it"


@scenario("database-clock-back", "PostgreSQL's clock jumps back by an hour", around=database_clock)
def database_clock_back(lab: Lab) -> None:
    jump(lab, lab.bench.postgres.socket.parent / OFFSET, postgres_clock, -HOUR)
