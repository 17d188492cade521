"""Does the pool's child work on the message it has? Seen in the database: a child at work holds a job.

A child that was stopped, or hangs in the kernel, as in a call to a file server that is gone, renews no lease, so its job goes to another
worker; its own parent goes on as if it were busy. (A child of which one thread hangs and another renews the lease is not seen here.)
"""

from __future__ import annotations

import time

JOBLESS_SECONDS = 30.0
"""A child may have a message and no job for a moment: before it claims, and after its job's end, as it sends messages and deletes files."""


class ChildWatch:
    """What the heartbeat finds, each time it looks."""

    def __init__(self) -> None:
        self._message: str | None = None
        self._jobless_since: float | None = None

    def look(self, message: str | None, *, holds_job: bool) -> str | None:
        """What is wrong with the child; None: nothing.

        Args:
            message: Id of the one it works on; None: it is free.
            holds_job: Whether its worker has a job in the database, under a lease that has not run out.
        """
        if message is None or holds_job:
            self._jobless_since = None
        elif message != self._message or self._jobless_since is None:
            self._jobless_since = time.monotonic()
        self._message = message
        if self._jobless_since is None:
            return None
        seconds = time.monotonic() - self._jobless_since
        if seconds <= JOBLESS_SECONDS:
            return None
        return f"its child process hangs: for {seconds:.0f} s it has had a message and held no job; restart the worker"
