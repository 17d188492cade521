"""How the running job hears that its Celery worker was told to stop.

Celery's warm shutdown (SIGTERM) waits for the running task and never tells it, and training takes days. So the parent process
raises a flag that its pool children, forked before or after, can see: a pipe with an unread byte in it. A pipe needs no lock and
no list of children, can be written from a signal handler, and also works where the pool is `solo` and there are no children.
"""

from __future__ import annotations

import contextlib
import os
import select


class ShutdownFlag:
    """Raised once, seen by this process and all forked from it."""

    def __init__(self) -> None:
        self._read_end, self._write_end = os.pipe()
        os.set_blocking(self._write_end, False)

    def raise_(self) -> None:
        """Async-signal-safe; raising it again changes nothing."""
        with contextlib.suppress(BlockingIOError):  # full of earlier bytes, so it is raised already
            os.write(self._write_end, b"!")

    def is_raised(self) -> bool:
        poll = select.poll()  # unlike select(), not limited to the first 1024 descriptors
        poll.register(self._read_end, select.POLLIN)
        return bool(poll.poll(0))

    def close(self) -> None:
        os.close(self._read_end)
        os.close(self._write_end)
