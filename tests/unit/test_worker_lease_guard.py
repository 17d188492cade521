"""The guard of a lease: a run ends with its lease and with its worker, whatever state the worker is in."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from tests.live import eventually
from worker.boot_clock import now
from worker.lease import LeaseKeeper
from worker.lease_guard import LeaseGuard, wait_for_end
from worker.run_cookie import COOKIE_VARIABLE, new_cookie, processes_with_cookie

TIMEOUT_SECONDS = 60.0

WORKER = """
import os, subprocess, sys, time
from worker.boot_clock import now
from worker.lease_guard import LeaseGuard
from worker.run_cookie import COOKIE_VARIABLE, processes_with_cookie
environment = {**os.environ, COOKIE_VARIABLE: sys.argv[1]}
training = subprocess.Popen(["sleep", "120"], env=environment, start_new_session=True)
while training.pid not in processes_with_cookie(sys.argv[1]):  # first, or the guard of a short lease could find none, and end
    time.sleep(0.01)
with LeaseGuard(sys.argv[1], float(sys.argv[2]), since=now()):
    print(training.pid, flush=True)
    time.sleep(120)
"""


@pytest.fixture
def cookie() -> Iterator[str]:
    made = new_cookie()
    yield made
    for pid in processes_with_cookie(made):
        os.kill(pid, signal.SIGKILL)


@contextmanager
def worker(cookie: str, lease_seconds: float) -> Iterator[tuple[psutil.Process, psutil.Process]]:
    """A worker that never renews, and its training process."""
    command = [sys.executable, "-c", WORKER, cookie, str(lease_seconds)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=Path(__file__).parents[2]) as process:
        assert process.stdout is not None
        try:
            yield psutil.Process(process.pid), psutil.Process(int(process.stdout.readline()))
        finally:
            process.kill()


def ends_within(process: psutil.Process, seconds: float = TIMEOUT_SECONDS) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if not process.is_running() or process.status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.02)
    return False


@contextmanager
def trainer(cookie: str) -> Iterator[psutil.Process]:
    with subprocess.Popen(["sleep", "120"], env={**os.environ, COOKIE_VARIABLE: cookie}) as process:
        try:
            yield psutil.Process(process.pid)
        finally:
            process.kill()


def guards() -> list[psutil.Process]:
    """Those of this process that live."""
    living = [child for child in psutil.Process().children() if child.status() != psutil.STATUS_ZOMBIE]
    return [child for child in living if "worker.lease_guard" in child.cmdline()]


def test_a_stopped_workers_run_ends_with_its_lease(cookie: str) -> None:
    started = now()
    with worker(cookie, 2.0) as (stopped, training):
        stopped.suspend()
        assert ends_within(training)
        assert now() - started >= 2.0, "before that the lease held"
        eventually(lambda: stopped.status() == psutil.STATUS_STOPPED or None)  # it had no part in this


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_it_logs_as_its_worker_does(cookie: str, log_format: str) -> None:
    code = f"""
import time
from service import logs
from worker.boot_clock import now
from worker.lease_guard import LeaseGuard
logs.configure(logs.LogFormat("{log_format}"))
logs.set_job("job-1", 2)
with LeaseGuard("{cookie}", 0.2, since=now()) as guard:
    guard._process.wait(60)
"""
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, check=True)
    message = "the lease was not renewed for 0.2 s: the run is killed"
    if log_format == "text":
        assert done.stderr == f"{message}\n"
        return
    (line,) = [json.loads(one) for one in done.stderr.splitlines()]
    del line["time"]
    assert line == {"level": "error", "logger": "worker.lease_guard", "message": message, "job_id": "job-1", "attempt": 2}


def test_the_guard_imports_little() -> None:
    """It must watch at once, on a machine that may be short of everything."""
    code = "import worker.lease_guard, sys; print(*sorted({name.split('.')[0] for name in sys.modules} - set(sys.stdlib_module_names)))"
    done = subprocess.run([sys.executable, "-S", "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[2], check=True)
    assert set(done.stdout.split()) <= {"service", "worker", "__main__"}


def test_a_killed_workers_run_ends_at_once(cookie: str) -> None:
    with worker(cookie, 3600.0) as (killed, training):
        killed.kill()
        assert ends_within(training)


def test_renewals_keep_the_run_past_the_lease_and_leaving_ends_it(cookie: str) -> None:
    """The lease has been held for most of its length, so that it would run out soon, and lasts once it is renewed."""
    since, lease_seconds = now() - 54.0, 60.0
    guard = LeaseGuard(cookie, lease_seconds, since=since)
    renewals = []

    def on_renewed(at: float) -> None:
        renewals.append(at)
        guard.renewed(at)

    keeper = LeaseKeeper(lambda: True, lambda: None, lease_seconds=lease_seconds, heartbeat_seconds=0.1, since=since, on_renewed=on_renewed)
    with trainer(cookie) as training:
        with guard, keeper:
            assert not ends_within(training, since + lease_seconds + 1.0 - now())
            eventually(lambda: len(renewals) > 3 or None)
            assert not ends_within(training, 0.1)
        assert ends_within(training)


def test_a_guard_that_was_held_up_reads_what_came_before_it_judges() -> None:
    read_end, write_end = os.pipe()
    long_ago = now() - 100.0
    assert wait_for_end(read_end, 60.0, long_ago), "nothing came"
    os.write(write_end, f"{now()}\n".encode())
    os.close(write_end)
    assert not wait_for_end(read_end, 60.0, long_ago), "the worker renewed it, and left"
    os.close(read_end)


def test_a_renewal_counts_from_its_own_moment_not_from_its_arrival(cookie: str) -> None:
    with trainer(cookie) as training, LeaseGuard(cookie, 2.0, since=now()) as guard:
        started = now()
        while not ends_within(training, 0.05):
            guard.renewed(started - 1.0)
            assert now() - started < TIMEOUT_SECONDS


def test_a_guard_ignores_polite_signals_and_is_replaced_when_killed(cookie: str) -> None:
    with trainer(cookie) as training, LeaseGuard(cookie, 600.0, since=now()) as guard:
        (first,) = eventually(lambda: guards() or None)  # a process that has just started has no command line yet
        eventually(lambda: _ignores_sigterm(first.pid) or None)
        first.terminate()
        assert not ends_within(first, 0.3)
        first.kill()
        assert ends_within(first)
        assert not ends_within(training, 0.1), "nobody guards it"
        renewed_at = now()
        almost_over = renewed_at - 598.0
        while not ends_within(training, 0.05):  # a write into a broken pipe may go through once
            guard.renewed(almost_over)
            assert now() - renewed_at < TIMEOUT_SECONDS, "the second guard is in charge"


def _ignores_sigterm(pid: int) -> bool:
    (line,) = [line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("SigIgn:")]
    return bool(int(line.split()[1], 16) & 1 << (signal.SIGTERM - 1))
