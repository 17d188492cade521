"""Work that is done again and again beside the jobs, from threads of the worker's parent process."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

logger = logging.getLogger(__name__)

STOP_SECONDS = 5.0
"""How long rounds under way are waited for at the end."""
OVERDUE_SECONDS = 60.0
"""No round is meant to take so long."""

_running: list[Rounds] = []
_held = threading.local()
"""What the thread that forks has locked."""
_is_hooked = False


class Rounds:
    """A daemon thread that calls `work`, pauses, and calls it again, whatever it raises.

    No fork falls into the middle of a round: a pool child forked there would inherit locks that nobody releases, and connections that
    are its parent's. So whatever may take long belongs into `forks_allowed`: a fork is the consumer's, and all waits for it.

    Args:
        name: Of the thread, and in the log.
        work: One round. It must not leave connections open.
        pause_seconds: From the end of a round to the next one, and before the first.
    """

    def __init__(self, name: str, work: Callable[[], None], *, pause_seconds: float) -> None:
        self.lock = threading.Lock()
        """Held during a round, and taken by every fork."""
        self.name = name
        self._work = work
        self._pause_seconds = pause_seconds
        self._done = threading.Event()
        self._ended_at: float | None = None
        """When the last round ended, or the first pause began (monotonic seconds). None: it was not started."""
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        _hook_forks()
        _running.append(self)
        self._ended_at = time.monotonic()
        self._thread.start()

    def run_once(self) -> None:
        """One round, now; it raises what `work` raises."""
        with self.lock:
            self._work()

    @contextmanager
    def forks_allowed(self) -> Iterator[None]:
        """In the middle of a round: nothing is locked or open that a child must not inherit. A socket that is, it keeps open for its life,
        which hurts nobody."""
        self.lock.release()
        try:
            yield
        finally:
            self.lock.acquire()

    def stop(self) -> None:
        """Let the round under way end, for some seconds at most; no other one comes."""
        stop_all([self])

    def problem(self) -> str | None:
        """Why it can't be relied on; None: its rounds end."""
        if self._ended_at is None:
            return None
        seconds = time.monotonic() - self._ended_at
        return f"{self.name}: no round has ended for {seconds:.0f} s" if seconds > self._pause_seconds + OVERDUE_SECONDS else None

    def _run(self) -> None:
        while not self._done.wait(self._pause_seconds):
            try:
                self.run_once()
            except Exception:  # whatever it is, the next round may do better
                logger.exception("%s: the round failed", self.name)
            self._ended_at = time.monotonic()

    def _join(self, until: float) -> None:
        self._thread.join(max(0.0, until - time.monotonic()))
        _running.remove(self)


def stop_all(some: Sequence[Rounds]) -> None:
    """Let the rounds under way end, for STOP_SECONDS at most; no other ones come."""
    for one in some:
        one._done.set()
    until = time.monotonic() + STOP_SECONDS
    for one in some:
        one._join(until)


def _hook_forks() -> None:
    global _is_hooked  # noqa: PLW0603  (a process can't take such a hook back)
    if not _is_hooked:
        os.register_at_fork(before=_hold, after_in_parent=_release, after_in_child=_release)
        _is_hooked = True


def _hold() -> None:
    _held.locks = [one.lock for one in _running]
    for lock in _held.locks:
        lock.acquire()


def _release() -> None:
    for lock in _held.locks:
        lock.release()
