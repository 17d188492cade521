"""One API of several processes: they share a port, tell of all measurements, and none outlives what started them."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import httpx
import psutil
import pytest

from tests.process_group import free_port

NUM_PROCESSES = 2
TIMEOUT_SECONDS = 60.0


@pytest.fixture
def api(postgres_url: str, tmp_path: Path) -> Iterator[tuple[str, psutil.Process]]:
    port = free_port()
    environment = {
        "CLIPRD_API_PROCESSES": str(NUM_PROCESSES),
        "CLIPRD_DATABASE_URL": postgres_url,
        "CLIPRD_BROKER_URL": "memory://",
        "CLIPRD_ARTIFACTS_ROOT": str(tmp_path / "artifacts"),
        "CLIPRD_PORT": str(port),
    }
    with subprocess.Popen([sys.executable, "-m", "service"], env={**os.environ, **environment}) as process:
        url = f"http://127.0.0.1:{port}"
        parent = psutil.Process(process.pid)
        try:
            wait_for(lambda: is_ready(url) and [is_listening(one) for one in servers(parent)] == [True] * NUM_PROCESSES)
            yield url, parent
        finally:
            process.terminate()
            process.wait(TIMEOUT_SECONDS)


def is_ready(url: str) -> bool:
    with suppress(httpx.TransportError):
        return get(f"{url}/readyz").is_success
    return False


def get(url: str) -> httpx.Response:
    """Over a connection of its own, which any process may take."""
    return httpx.get(url, trust_env=False, timeout=TIMEOUT_SECONDS)


def servers(parent: psutil.Process) -> list[psutil.Process]:
    """The processes that answer; Python's resource tracker is none of them."""
    found = []
    for child in parent.children():
        with suppress(psutil.NoSuchProcess):  # a zombie, too
            if "spawn_main" in " ".join(child.cmdline()):
                found.append(child)
    return found


def is_listening(process: psutil.Process) -> bool:
    return any(one.status == psutil.CONN_LISTEN for one in process.net_connections())


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + TIMEOUT_SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def num_answers(url: str) -> int:
    """Answers to /healthz, as one of the processes tells."""
    text = get(f"{url}/metrics").text
    found = re.findall(r'^cliprd_request_seconds_count\{[^}]*route="/healthz"[^}]*\} ([0-9.]+)$', text, flags=re.MULTILINE)
    assert len(found) <= 1, "a series of each process"
    return int(float(found[0])) if found else 0


def test_each_tells_the_measurements_of_all(api: tuple[str, psutil.Process]) -> None:
    url, _ = api
    for _ in range(40):
        assert get(f"{url}/healthz").is_success
    wait_for(lambda: num_answers(url) == 40)  # an answer is measured after it has been sent
    assert {num_answers(url) for _ in range(10)} == {40}


def test_a_burst_of_connections_is_spread_evenly(api: tuple[str, psutil.Process]) -> None:
    url, parent = api
    host, port = url.removeprefix("http://").split(":")
    with ExitStack() as opened:
        for _ in range(200):
            opened.enter_context(socket.create_connection((host, int(port))))
        wait_for(lambda: sum(num_connections(one) for one in servers(parent)) >= 200)
        assert min(num_connections(one) for one in servers(parent)) > 50  # by chance, once in 10^12 times


def num_connections(process: psutil.Process) -> int:
    """Of clients; the port is on this machine's own side."""
    listening = {one.laddr.port for one in process.net_connections() if one.status == psutil.CONN_LISTEN}
    return sum(one.status == psutil.CONN_ESTABLISHED and one.laddr.port in listening for one in process.net_connections())


def test_a_port_that_another_service_has_is_not_shared_with_it(api: tuple[str, psutil.Process]) -> None:
    _, parent = api
    command = [sys.executable, "-m", "service"]
    second = subprocess.run(command, env=parent.environ(), capture_output=True, text=True, timeout=TIMEOUT_SECONDS, check=False)
    assert second.returncode != 0
    assert "already in use" in second.stderr


def test_one_that_dies_is_replaced_and_its_measurements_stay(api: tuple[str, psutil.Process]) -> None:
    url, parent = api
    get(f"{url}/healthz").raise_for_status()
    wait_for(lambda: num_answers(url) == 1)  # measured after it has been sent, by one that must not be killed before
    killed = servers(parent)
    for one in killed:
        one.kill()
    wait_for(lambda: len([one for one in servers(parent) if one not in killed]) == NUM_PROCESSES and is_ready(url))
    assert num_answers(url) == 1


def test_none_outlives_what_started_them(api: tuple[str, psutil.Process]) -> None:
    _, parent = api
    children = servers(parent)
    parent.send_signal(signal.SIGKILL)
    gone, alive = psutil.wait_procs(children, timeout=TIMEOUT_SECONDS)
    assert len(gone) == NUM_PROCESSES
    assert alive == []
