"""Whether the service can work: looked at by one thread for all who ask, in a limited time.

Who asks may be a stranger, since probes have no key. So asking often costs no more than asking now and then, and a part that does not
answer keeps nobody's thread waiting but that of its own look.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, wait
from dataclasses import dataclass
from typing import TypeVar

from kombu.exceptions import KombuError
from redis.exceptions import RedisError
from sqlalchemy.exc import SQLAlchemyError

from service.problems import FieldProblem

Result = TypeVar("Result")

LIMIT_SECONDS = 3.0
"""What has not answered by then counts as failed."""

READY_SECONDS = 5.0
"""How long `ready` is told without another look."""

NOT_READY_SECONDS = 1.0
"""How long the opposite is told: shorter, as somebody is waiting for it to pass."""

FAILURES = (SQLAlchemyError, KombuError, RedisError, OSError)
"""What a part raises that can't be used."""


@dataclass(frozen=True)
class Part:
    """Something the service needs."""

    check: Callable[[], None]
    """Raises one of `FAILURES` where it can't be used."""
    remedy: str


class Readiness:
    """What is wrong with the parts, known to within a few seconds.

    Args:
        parts: By the name that problems call them.
    """

    def __init__(self, parts: Mapping[str, Part]) -> None:
        self._parts = parts
        self._looks: dict[str, Future[None]] = {}  # the latest of each part; one that hangs is waited for, not doubled
        self._lock = threading.Lock()
        self._latest: Future[list[FieldProblem]] | None = None
        self._stale_at = 0.0  # by the monotonic clock

    async def problems(self) -> list[FieldProblem]:
        """Part by part; empty if all can be used."""
        with self._lock:
            if self._latest is None or (self._latest.done() and time.monotonic() >= self._stale_at):
                self._latest = _in_thread(self._look)
            latest = self._latest
        return await asyncio.wrap_future(latest)

    def _look(self) -> list[FieldProblem]:
        for name, part in self._parts.items():
            if name not in self._looks or self._looks[name].done():
                self._looks[name] = _in_thread(part.check)
        wait(self._looks.values(), timeout=LIMIT_SECONDS)
        found = {name: _problem_of(look) for name, look in self._looks.items()}
        problems = [FieldProblem(field=name, problem=one, remedy=self._parts[name].remedy) for name, one in found.items() if one]
        self._stale_at = time.monotonic() + (NOT_READY_SECONDS if problems else READY_SECONDS)
        return problems


def _problem_of(look: Future[None]) -> str | None:
    if not look.done():
        return f"has not answered for {LIMIT_SECONDS:g} s"
    try:
        look.result()
    except FAILURES as error:
        return next(iter(str(error).splitlines()), type(error).__name__)
    return None


def _in_thread(work: Callable[[], Result]) -> Future[Result]:
    """What `work` gives, in a thread of its own that nothing waits for when the process ends."""
    future: Future[Result] = Future()
    future.set_running_or_notify_cancel()  # so that nobody who waits for it can cancel it for others

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name="readiness", daemon=True).start()
    return future
