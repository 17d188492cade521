"""Requests that wait at once share a call."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence

import pytest

from service.batches import MAX_CALLS, MAX_ITEMS, Batches

TIMEOUT_SECONDS = 60


class Work:
    """Doubles numbers, once it is let go; odd ones fail, and negative ones fail all."""

    def __init__(self) -> None:
        self.calls: list[list[int]] = []
        self.may_go_on = threading.Event()

    def __call__(self, items: Sequence[int]) -> list[int | Exception]:
        self.calls.append(list(items))
        assert self.may_go_on.wait(TIMEOUT_SECONDS)
        if min(items) < 0:
            raise OSError("the server is gone")
        return [ValueError(f"{item} is odd") if item % 2 else 2 * item for item in items]


def run(work: Work, items: Sequence[int]) -> list[int | BaseException]:
    """All at once, of which the first ones are called for before the others come."""

    async def all_items() -> list[int | BaseException]:
        batches = Batches(work)
        first = [asyncio.create_task(batches.do(item)) for item in items[:MAX_CALLS]]
        async with asyncio.timeout(TIMEOUT_SECONDS):
            while len(work.calls) < 1:
                await asyncio.sleep(0.001)
            rest = [asyncio.create_task(batches.do(item)) for item in items[MAX_CALLS:]]
            await asyncio.sleep(0)
            work.may_go_on.set()
            return await asyncio.gather(*first, *rest, return_exceptions=True)

    return asyncio.run(all_items())


def test_what_comes_while_a_call_runs_shares_the_next_one_in_order() -> None:
    work = Work()
    items = list(range(0, 2 * (MAX_ITEMS + 10), 2))
    assert run(work, items) == [2 * item for item in items]
    assert sorted(item for call in work.calls for item in call) == items
    assert all(call == sorted(call) for call in work.calls)
    assert max(map(len, work.calls)) <= MAX_ITEMS
    assert len(work.calls) <= MAX_CALLS + 2


def test_a_failure_is_told_to_whom_it_concerns() -> None:
    results = run(Work(), [0, 2, 4, 5, 6])
    assert [str(one) if isinstance(one, ValueError) else one for one in results] == [0, 4, 8, "5 is odd", 12]


def test_what_the_call_itself_raises_is_told_to_all_and_ends_nothing() -> None:
    work = Work()
    work.may_go_on.set()

    async def after_a_failure() -> int:
        batches = Batches(work)
        failed = await asyncio.gather(*(batches.do(item) for item in (-2, 2, 4)), return_exceptions=True)
        assert [type(one) for one in failed] == [OSError] * 3
        return await batches.do(2)

    assert asyncio.run(after_a_failure()) == 4


def test_a_request_that_is_gone_does_not_trouble_the_others() -> None:
    work = Work()

    async def one_leaves() -> int:
        batches = Batches(work)
        leaving, staying = (asyncio.create_task(batches.do(item)) for item in (2, 4))
        async with asyncio.timeout(TIMEOUT_SECONDS):
            while not work.calls:
                await asyncio.sleep(0.001)
            leaving.cancel()
            work.may_go_on.set()
            with pytest.raises(asyncio.CancelledError):
                await leaving
            return await staying

    assert asyncio.run(one_leaves()) == 8
