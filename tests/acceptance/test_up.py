"""`cliprd up` as a process: it says where it is, refuses a home or a port in use, and takes everything down with it."""

from __future__ import annotations

import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from service.client import Client
from service.embedded import HOST, EmbeddedError, EmbeddedStack, held_port
from service.store.session import make_engine, make_sessions, reading
from service.store.states import JobState
from service.store.workers import list_workers
from tests.live import TIMEOUT_SECONDS, Jobs, alive, eventually, processes_of
from tests.tiny import write_shards

CLIPRD = str(Path(sys.executable).with_name("cliprd"))


class Up:
    """A running `cliprd up`."""

    def __init__(self, home: Path, *arguments: str) -> None:
        self.home = home
        self.process = subprocess.Popen(
            [CLIPRD, "up", "--home", str(home), "--port", "0", *arguments], stdout=subprocess.PIPE, text=True, env={"PYTHONUNBUFFERED": "1"}
        )
        assert self.process.stdout is not None
        found = re.search(r"http://127\.0\.0\.1:(\d+)", self.process.stdout.readline())
        assert found is not None
        self.url, self.port = found[0], found[1]
        self.children = psutil.Process(self.process.pid).children(recursive=True)

    def get(self, path: str, **options: Any) -> httpx.Response:
        return httpx.get(f"{self.url}{path}", timeout=TIMEOUT_SECONDS, **options)


@pytest.fixture
def up(tmp_path: Path) -> Iterator[Up]:
    up = Up(tmp_path / "home")
    yield up
    up.process.kill()
    up.process.communicate()


def try_up(*arguments: str) -> str:
    ended = subprocess.run([CLIPRD, "up", *arguments], capture_output=True, text=True, timeout=TIMEOUT_SECONDS, check=False)
    assert ended.returncode == 1
    assert "Traceback" not in ended.stderr
    return ended.stderr


def test_it_refuses_a_home_or_a_port_in_use_and_stops_in_order(up: Up, tmp_path: Path) -> None:
    eventually(lambda: up.get("/readyz").json() == {"status": "ready"} or None)  # it may seem otherwise while the machine stands still
    assert len(up.children) >= 3, "Redis, API and worker"
    assert f"already runs in {up.home}" in try_up("--home", str(up.home), "--port", "0")
    assert f"--port {int(up.port) + 1}" in try_up("--home", str(tmp_path / "other"), "--port", up.port)
    (blocked := tmp_path / "blocked").mkdir()
    (blocked / "artifacts").touch()
    assert f"the artifact folder can't be used: [Errno 17] File exists: '{blocked}/artifacts'" in try_up(
        "--home", str(blocked), "--port", "0"
    )
    up.process.send_signal(signal.SIGTERM)
    said, _ = up.process.communicate(timeout=TIMEOUT_SECONDS)
    assert up.process.returncode == 0
    assert "Stopping" in said
    assert not alive(up.children)
    assert not workers_told_of(up.home), "a worker that is not killed takes leave"


def workers_told_of(home: Path) -> list[str]:
    engine = make_engine(f"sqlite:///{home / 'cliprd.db'}")
    try:
        with reading(make_sessions(engine)) as session:
            return [worker.id for worker in list_workers(session=session)]
    finally:
        engine.dispose()


def test_a_killed_one_takes_everything_with_it(up: Up) -> None:
    up.process.kill()
    eventually(lambda: not alive(up.children) or None)


def test_it_listens_for_other_machines_once_there_is_a_key(tmp_path: Path) -> None:
    home = tmp_path / "home"
    refusal = try_up("--home", str(home), "--port", "0", "--host", "0.0.0.0")
    assert "no API key has been made yet" in refusal
    found = re.search(r"`cliprd (keys create .*) --name NAME (.*)`", refusal)
    assert found is not None
    made = subprocess.run([CLIPRD, *found[1].split(), "--name", "x", *found[2].split()], capture_output=True, text=True, check=True)
    up = Up(home, "--host", "0.0.0.0")
    try:
        listening = {one.laddr.ip for child in alive(up.children) for one in child.net_connections() if str(one.laddr.port) == up.port}
        assert "0.0.0.0" in listening
        assert up.get("/jobs").status_code == 401
        assert up.get("/jobs", headers={"Authorization": f"Bearer {made.stdout.strip()}"}).status_code == 200
    finally:
        up.process.send_signal(signal.SIGINT)
        up.process.communicate(timeout=TIMEOUT_SECONDS)


def test_a_job_goes_on_at_once_after_everything_was_killed(tmp_path: Path) -> None:
    lasting = {"CLIPRD_LEASE_SECONDS": "600", "CLIPRD_REAPER_SECONDS": "0.5", "CLIPRD_DATA_ROOTS": str(tmp_path)}
    shards = write_shards(tmp_path / "shards", 32)
    with EmbeddedStack(tmp_path / "home", port=0, environment=lasting) as stack, Client(stack.url) as client:
        jobs = Jobs(client, shards, Path(stack.environment["CLIPRD_RUNS_ROOT"]))
        job_id = jobs.submit(epochs=100)
        jobs.wait_for_checkpoint(job_id)
        for child in stack.children.values():
            assert child.process is not None
            child.process.kill()
        eventually(lambda: not processes_of(job_id) or None)
    with EmbeddedStack(tmp_path / "home", port=0, environment=lasting) as stack, Client(stack.url) as client:
        jobs = Jobs(client, shards, jobs.runs)
        job = jobs.wait_for(job_id, JobState.SUCCEEDED)
        assert (job.attempt, job.failed_attempts) == (2, 0), "it got further than the first"
        assert jobs.steps_of_attempt(jobs.run_dir(job_id), 2)[0] > 1
        other = jobs.submit(epochs=100)
        jobs.wait_for_checkpoint(other)
        worker = stack.children["worker"].process
        assert worker is not None
        worker.kill()
        worker.wait()
        stack.watch(print)
        assert jobs.wait_for(other, JobState.SUCCEEDED).attempt == 2


def test_a_port_is_kept_for_the_server_that_is_to_have_it() -> None:
    with held_port(0) as port, socket.socket() as other, socket.socket() as server:
        with pytest.raises(OSError, match="in use"):
            other.bind((HOST, port))
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        server.bind((HOST, port))
        server.listen()
        with pytest.raises(EmbeddedError, match="is taken"), held_port(port):
            pass
