"""Ends a run whose lease is not renewed, even while its worker can do nothing: stopped by a signal, swapped out, hung.

Without it, a stopped worker's training would go on beside the attempt of whoever gets the job next. `LeaseGuard` is the worker's
side; it starts this module as a process of its own, `python -m worker.lease_guard COOKIE LEASE_SECONDS SINCE LOGS`, which imports the
standard library only, and modules that do so. The worker writes it a line at each renewal: when the lease was renewed, on the clock of
`now`. When the lease runs out, or the worker is gone, the guard kills every process of the run, and ends.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import signal
import subprocess
import sys
import threading
from types import TracebackType
from typing import Self

from service.logs import handed_down, take_over
from worker.boot_clock import now
from worker.run_cookie import COOKIE_VARIABLE, kill_processes

logger = logging.getLogger("worker.lease_guard")  # also where this module is the program

END_TIMEOUT_SECONDS = 15.0


class LeaseGuard:
    """Context manager: the guard of the run with `cookie`, in which the run must start and end. Leaving it kills the run.

    Args:
        cookie: In the environment of every process of the run.
        lease_seconds: How long the lease lasts without renewal.
        since: From when on it counts, as `now` says.
    """

    def __init__(self, cookie: str, lease_seconds: float, *, since: float) -> None:
        self._cookie = cookie
        self._lease_seconds = lease_seconds
        self._since = since
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        self._start(self._since)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        with self._lock:
            process, self._process = self._process, None
            assert process is not None, "entered"
            assert process.stdin is not None, "a pipe"
            with contextlib.suppress(OSError):
                process.stdin.close()
            try:
                process.wait(END_TIMEOUT_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def renewed(self, at: float) -> None:
        """The lease counts from `at` (as `now` says) again. A guard that somebody killed is replaced."""
        with self._lock:
            if self._process is None:
                return
            assert self._process.stdin is not None, "a pipe"
            try:
                self._process.stdin.write(f"{at}\n".encode())
            except OSError:
                logger.warning("the guard of the lease has gone; starting another")
                self._process.stdin.close()
                self._process.wait()
                self._start(at)

    def _start(self, since: float) -> None:
        environment = {name: value for name, value in os.environ.items() if name != COOKIE_VARIABLE}
        command = [sys.executable, "-m", "worker.lease_guard", self._cookie, str(self._lease_seconds), str(since), handed_down()]
        # A session of its own, so that no signal to the worker's group reaches it.
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, bufsize=0, env=environment, start_new_session=True)


def wait_for_end(stdin: int, lease_seconds: float, since: float) -> bool:
    """Wait until the lease runs out or the worker closes the pipe.

    Returns:
        Whether the lease ran out.
    """
    rest = b""
    while True:
        seconds_left = since + lease_seconds - now()
        if not select.select([stdin], [], [], max(0.0, seconds_left))[0]:  # renewals may have come while this process was held up
            if seconds_left <= 0:
                return True
            continue
        received = os.read(stdin, 4096)
        if not received:
            return False
        *lines, rest = (rest + received).split(b"\n")
        since = max(since, *(float(line) for line in lines)) if lines else since


def main() -> None:
    cookie, lease_seconds, since = sys.argv[1], float(sys.argv[2]), float(sys.argv[3])
    for polite in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(polite, signal.SIG_IGN)  # a service manager sends them to all processes; the run's end is the worker's to decide
    take_over(sys.argv[4])
    has_run_out = wait_for_end(sys.stdin.fileno(), lease_seconds, since)
    if has_run_out:
        logger.error("the lease was not renewed for %g s: the run is killed", lease_seconds)
    kill_processes(cookie)


if __name__ == "__main__":
    main()
