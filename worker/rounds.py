"""Work that is done again and again beside the jobs, from threads of the worker's parent process."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable

logger = logging.getLogger(__name__)

_running: list[Rounds] = []
_held = threading.local()
"""What the thread that forks has locked."""
_is_hooked = False


class Rounds:
    """A daemon thread that calls `work`, pauses, and calls it again, whatever it raises.

    No fork falls into the middle of a round: a pool child forked there would inherit locks that nobody releases, and connections that
    are its parent's.

    Args:
        name: Of the thread, and in the log.
        work: One round. It must not leave connections open.
        pause_seconds: From the end of a round to the next one, and before the first.
    """

    def __init__(self, name: str, work: Callable[[], None], *, pause_seconds: float) -> None:
        self.lock = threading.Lock()
        """Held during a round, and taken by every fork."""
        self._name = name
        self._work = work
        self._pause_seconds = pause_seconds
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        _hook_forks()
        _running.append(self)
        self._thread.start()

    def stop(self) -> None:
        """Let the round under way end, for some seconds at most; no other one comes."""
        self._done.set()
        self._thread.join(timeout=5)
        _running.remove(self)

    def _run(self) -> None:
        while not self._done.wait(self._pause_seconds):
            try:
                with self.lock:
                    self._work()
            except Exception:  # whatever it is, the next round may do better
                logger.exception("the %s's round failed", self._name)


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
