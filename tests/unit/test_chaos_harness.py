"""The chaos suite's eyes see what they are there to see: what would break an invariant is noticed."""

from __future__ import annotations

import random
import socket
import subprocess
import sys
import threading
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from pathlib import Path

import pytest

from service.schemas import EventView
from service.store.kinds import EventKind
from tests.chaos.invariants import check_claims
from tests.chaos.proxy import Network, Proxy
from tests.chaos.trainers import MARK_VARIABLE, Census, TrainerWatch
from tests.live import eventually
from worker.run_cookie import COOKIE_VARIABLE

MARK = f"a mark of this test's {uuid.uuid4().hex}"
JOB_ID = "job-0001"


@contextmanager
def trainer(cookie: str) -> Iterator[subprocess.Popen[bytes]]:
    """A process that looks like a training process of JOB_ID."""
    command = [sys.executable, "-c", "import time; time.sleep(600)", f"/runs/{JOB_ID}/spec.json"]
    process = subprocess.Popen(command, env={MARK_VARIABLE: MARK, COOKIE_VARIABLE: cookie, "RANK": "0"})
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def test_two_runs_of_a_job_at_once_are_noticed() -> None:
    with ExitStack() as stack:
        watch = stack.enter_context(TrainerWatch(MARK))
        first = stack.enter_context(trainer("first"))
        eventually(lambda: watch.cookies.get(JOB_ID))
        assert not watch.overlaps()
        stack.enter_context(trainer("second"))
        overlap = eventually(lambda: next(iter(watch.overlaps()), None))
        assert overlap.job_id == JOB_ID
        assert watch.cookies[JOB_ID] == ["first", "second"]
        assert first.poll() is None


def test_runs_after_each_other_are_no_overlap() -> None:
    with TrainerWatch(MARK) as watch:
        for cookie in ("first", "second"):
            with trainer(cookie):
                eventually(lambda cookie=cookie: cookie in watch.cookies.get(JOB_ID, []) or None)
        assert not watch.overlaps()


def test_a_process_that_is_left_is_found() -> None:
    assert not Census(MARK).take()
    with trainer("left"):
        (found,) = eventually(lambda: Census(MARK).take() or None)
        assert (found.cookie, found.job_id, found.trains) == ("left", JOB_ID, True)


@pytest.mark.parametrize(
    ("attempts", "fault"),
    [
        ([("queued", 0), ("claimed", 1), ("lease_lost", 1), ("queued", 1), ("claimed", 2)], None),
        ([("queued", 0), ("claimed", 1), ("attempt_lost", 1), ("queued", 1), ("claimed", 2)], None),
        ([("queued", 0), ("claimed", 1), ("claimed", 2)], "while it was held"),
        ([("queued", 0), ("claimed", 1), ("queued", 1), ("claimed", 1)], "[1, 1]"),
    ],
)
def test_claims_of_a_held_job_are_noticed(attempts: list[tuple[str, int]], fault: str | None) -> None:
    now = datetime.now(UTC)
    events = [
        EventView(id=number, kind=EventKind(kind), time=now, attempt=attempt, data={}) for number, (kind, attempt) in enumerate(attempts)
    ]
    faults = check_claims(events)
    assert (fault is None) == (not faults)
    assert fault is None or fault in faults[0]


@pytest.fixture
def echo(tmp_path: Path) -> Iterator[Path]:
    """A server on a Unix socket that sends back what it is sent."""

    def serve(connection: socket.socket) -> None:
        with connection:
            while chunk := connection.recv(1024):
                connection.sendall(chunk)

    def accept() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=serve, args=[connection], daemon=True).start()

    path = tmp_path / "echo"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        threading.Thread(target=accept, daemon=True).start()
        yield path
        listener.shutdown(socket.SHUT_RDWR)


def connect(proxy: Proxy) -> socket.socket:
    return socket.create_connection(("127.0.0.1", proxy.port), timeout=60)


def test_a_silent_network_delivers_late_and_a_refusing_one_breaks_connections(echo: Path) -> None:
    with Proxy(echo, cut_probability=0.0, rng=random.Random(0)) as proxy, connect(proxy) as client:
        client.sendall(b"now")
        assert client.recv(10) == b"now"
        proxy.set(Network.SILENT)
        client.sendall(b"late")
        client.settimeout(0.2)
        with pytest.raises(TimeoutError):
            client.recv(10)
        proxy.set(Network.WHOLE)
        client.settimeout(60)
        assert client.recv(10) == b"late"
        proxy.set(Network.REFUSING)
        with pytest.raises(ConnectionResetError):
            client.recv(10)
        with pytest.raises(ConnectionRefusedError):
            connect(proxy)
        proxy.set(Network.WHOLE)
        with connect(proxy) as other:
            other.sendall(b"again")
            assert other.recv(10) == b"again"


def test_a_cutting_network_breaks_connections(echo: Path) -> None:
    with Proxy(echo, cut_probability=1.0, rng=random.Random(0)) as proxy:
        proxy.set(Network.CUTTING)
        for number in range(1, 7):
            with connect(proxy) as client:
                client.sendall(b"x")
                with pytest.raises(ConnectionResetError):
                    client.recv(10)
            assert proxy.num_cut == number
