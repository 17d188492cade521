"""Messages about new jobs: sent after the answers, in order, and given up when the broker is down."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest

from service import messages as messages_module
from service.messages import MAX_MESSAGES, MIN_BURST, PAUSE_SECONDS, SETTLE_SECONDS, Messages
from service.queue import JobQueue
from service.store.transitions import QueuedJob

TIMEOUT_SECONDS = 60


class Broker(JobQueue):
    """Keeps what is sent; takes `num_taken` calls, and is down after that."""

    def __init__(self, num_taken: int = 1000) -> None:
        super().__init__("memory://", timeout_seconds=1)
        self.calls: list[list[QueuedJob]] = []
        self.num_taken = num_taken

    def send(self, queued: Sequence[QueuedJob]) -> bool:
        self.calls.append(list(queued))
        return len(self.calls) <= self.num_taken


JOBS = [QueuedJob(f"job-{number}", "default") for number in range(2 * MAX_MESSAGES + 1)]


def send_all(broker: Broker, jobs: Sequence[QueuedJob] = JOBS) -> None:
    async def sending() -> None:
        messages = Messages(broker, is_busy=lambda: False)
        for job in jobs:
            messages.send_soon(job)
        await asyncio.wait_for(messages.drain(), TIMEOUT_SECONDS)

    asyncio.run(sending())


def test_all_are_sent_once_and_in_order() -> None:
    broker = Broker()
    send_all(broker)
    assert [job for call in broker.calls for job in call] == JOBS


def test_a_broker_that_is_down_is_not_asked_for_each() -> None:
    broker = Broker(num_taken=1)
    send_all(broker)
    assert len(broker.calls) == 2


@pytest.fixture
def holds_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(messages_module, "MAX_SECONDS_HELD", 3600.0)


@pytest.mark.usefixtures("holds_for_ever")
def test_answers_go_first() -> None:
    async def waiting() -> None:
        broker, busy = Broker(), True
        messages = Messages(broker, is_busy=lambda: busy)
        messages.send_soon(JOBS[0])
        await asyncio.sleep(20 * PAUSE_SECONDS)
        assert broker.calls == []
        busy = False
        await asyncio.wait_for(messages.drain(), TIMEOUT_SECONDS)
        assert broker.calls == [JOBS[:1]]

    asyncio.run(waiting())


def test_but_not_for_ever() -> None:
    async def waiting() -> None:
        broker = Broker()
        messages = Messages(broker, is_busy=lambda: True)
        messages.send_soon(JOBS[0])
        await asyncio.wait_for(messages.drain(), TIMEOUT_SECONDS)
        assert broker.calls == [JOBS[:1]]

    asyncio.run(waiting())


@pytest.mark.usefixtures("holds_for_ever")
def test_after_a_burst_those_of_other_processes_go_first_too() -> None:
    async def waiting() -> None:
        time = asyncio.get_running_loop().time
        broker, busy, told_busy_at = Broker(), True, 0.0

        def is_busy() -> bool:
            nonlocal told_busy_at
            told_busy_at = time() if busy else told_busy_at
            return busy

        messages = Messages(broker, is_busy=is_busy)
        for job in JOBS[:MIN_BURST]:
            messages.send_soon(job)
        await asyncio.sleep(5 * PAUSE_SECONDS)
        busy = False
        await asyncio.wait_for(messages.drain(), TIMEOUT_SECONDS)
        assert time() - told_busy_at >= SETTLE_SECONDS
        assert broker.calls == [JOBS[:MIN_BURST]]

    asyncio.run(waiting())
