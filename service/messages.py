"""Messages to the workers about new jobs: sent when their submissions have been answered, since a message takes as long as the rest."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextvars import Context

from fastapi.concurrency import run_in_threadpool

from service.queue import JobQueue
from service.store.transitions import QueuedJob

MAX_SECONDS_HELD = 2.0
"""As long as submissions keep coming, messages wait for the answers; not longer, though, as workers wait for them."""
PAUSE_SECONDS = 0.01
SETTLE_SECONDS = 0.25
"""After a burst they wait as long, since other processes of the API may still answer their share of it."""
MIN_BURST = 20
"""So many unsent messages are of a burst."""
MAX_MESSAGES = 50
"""Of one call, between which answers may go first again."""


class Messages:
    """Sends in the background what it is given, in its order. What a process leaves unsent when it is killed, or the broker doesn't
    take, the reaper sends.

    Args:
        is_busy: Whether submissions wait for their answers.
    """

    def __init__(self, queue: JobQueue, *, is_busy: Callable[[], bool]) -> None:
        self._queue = queue
        self._is_busy = is_busy
        self._unsent: list[QueuedJob] = []
        self._sending: asyncio.Task[None] | None = None  # touched by the event loop alone, as what is unsent

    def send_soon(self, job: QueuedJob) -> None:
        """Send the message of a job that is stored."""
        self._unsent.append(job)
        if self._sending is None or self._sending.done():
            # In no request's context: its log lines are about many of them.
            self._sending = asyncio.get_running_loop().create_task(self._send_all(), context=Context())

    async def drain(self) -> None:
        """Wait until nothing is unsent."""
        if self._sending is not None:
            await self._sending

    async def _send_all(self) -> None:
        while self._unsent:
            await self._let_answers_go_first()
            batch, self._unsent = self._unsent[:MAX_MESSAGES], self._unsent[MAX_MESSAGES:]
            if not await run_in_threadpool(self._queue.send, batch):
                self._unsent.clear()  # each would wait for the broker in vain

    async def _let_answers_go_first(self) -> None:
        time = asyncio.get_running_loop().time
        deadline, settled_at = time() + MAX_SECONDS_HELD, 0.0
        while time() < deadline and (self._is_busy() or time() < settled_at):
            if self._is_busy() and len(self._unsent) >= MIN_BURST:
                settled_at = time() + SETTLE_SECONDS
            await asyncio.sleep(PAUSE_SECONDS)
