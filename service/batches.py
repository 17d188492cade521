"""What many requests ask of the database at once, done by one call for all that wait: one transaction instead of hundreds."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from contextvars import Context
from typing import Generic, TypeVar

from fastapi.concurrency import run_in_threadpool

Item = TypeVar("Item")
Result = TypeVar("Result")

MAX_ITEMS = 100
"""Of one call: what comes first is not to wait long for what comes after it."""
MAX_CALLS = 2
"""At once, so that one that waits for a lock or a silent server does not hold up all that come after it. Not more: threads that call the
system again and again, each of which waits for Python's lock every time, take several times as long as one that does their work."""


class Batches(Generic[Item, Result]):
    """Calls `work` in a thread with all items that have come since its last call, in the order in which they came.

    An item that comes alone is worked on at once; nothing waits for others to come. Every call begins after its items came, so it reads
    nothing that was out of date for one of them.

    Args:
        work: Gives for each item its result, or the exception that is to be raised for it. What it raises itself is raised for all.
        max_calls: At once.
    """

    def __init__(self, work: Callable[[Sequence[Item]], Sequence[Result | Exception]], *, max_calls: int = MAX_CALLS) -> None:
        self._work = work
        self._max_calls = max_calls
        self._waiting: list[tuple[Item, asyncio.Future[Result]]] = []
        self._calling: set[asyncio.Task[None]] = set()  # touched by the event loop alone, as what waits is

    @property
    def is_busy(self) -> bool:
        """Whether anyone waits for a result."""
        return bool(self._calling)

    async def do(self, item: Item) -> Result:
        """The item's result."""
        future: asyncio.Future[Result] = asyncio.get_running_loop().create_future()
        self._waiting.append((item, future))
        if len(self._calling) < self._max_calls:
            # In no request's context: its log lines are about many of them.
            self._calling.add(asyncio.get_running_loop().create_task(self._call(), context=Context()))
        return await future

    async def _call(self) -> None:
        try:
            while self._waiting:
                await self._call_once()
        finally:
            self._calling.discard(asyncio.current_task())

    async def _call_once(self) -> None:
        batch, self._waiting = self._waiting[:MAX_ITEMS], self._waiting[MAX_ITEMS:]
        results: Sequence[Result | Exception]
        try:
            results = await run_in_threadpool(self._work, [item for item, _ in batch])
        except Exception as error:  # whatever it is, it is for those who wait
            results = [error] * len(batch)
        for (_, future), result in zip(batch, results, strict=True):
            if future.done():  # cancelled: its request is gone
                continue
            if isinstance(result, Exception):
                future.set_exception(result)
            else:
                future.set_result(result)
