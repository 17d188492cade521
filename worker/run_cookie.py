"""Finding and killing every process of a run, whatever its session or parent. Standard library only: the lease guard must start at once.

torchrun gives every training process a session of its own, and those start data loaders, so no process group holds the whole run.
Each process of a run therefore carries a cookie in its environment, and what kills a run goes by that (Linux: /proc/PID/environ).
"""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

COOKIE_VARIABLE = "CLIPRD_RUN_COOKIE"
KILL_TIMEOUT_SECONDS = 10.0  # a killed process that is still there then hangs in the kernel


def new_cookie() -> str:
    return secrets.token_hex(16)


def processes_with_cookie(cookie: str) -> Iterator[int]:
    """Ids of live processes that carry the cookie in their environment."""
    wanted = f"{COOKIE_VARIABLE}={cookie}".encode()
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            with contextlib.suppress(OSError):  # ended meanwhile, or another user's
                if wanted in (folder / "environ").read_bytes().split(b"\0"):
                    yield int(folder.name)


def _start_of(pid: int) -> bytes | None:
    """When a process started, in the kernel's ticks; None: it has ended, with all of its threads."""
    try:
        state, *others = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()  # the name before it can be any bytes
    except OSError:
        return None
    num_threads, start = int(others[16]), others[18]
    return None if state in (b"Z", b"X") and num_threads <= 1 else start  # that state is its first thread's, and the others hold its files


def kill_processes(cookie: str, reap: Callable[[], bool] = lambda: True) -> list[int]:
    """SIGKILL all processes with the cookie, and those they start meanwhile, until none is left.

    Args:
        cookie: The run's.
        reap: Collects the caller's own child, if it has one among them; True once that has ended.

    Returns:
        Those that survive after KILL_TIMEOUT_SECONDS, since they hang in the kernel; mostly none.
    """
    deadline = time.monotonic() + KILL_TIMEOUT_SECONDS
    killed: dict[int, bytes | None] = {}  # with when they started, as ids are used again
    while True:
        found = list(processes_with_cookie(cookie))
        killed |= {pid: _start_of(pid) for pid in found}
        for pid in found:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        # A process that ends lets go of its environment first, and of its files and locks after that.
        survivors = [pid for pid, start in killed.items() if start is not None and _start_of(pid) == start]
        if reap() and not found and not survivors:
            return []
        if time.monotonic() > deadline:
            return survivors
        time.sleep(0.02)
