"""The lease keeper: renews by itself, retries while the store is away, and knows when the lease must count as lost."""

import threading
import time
from collections.abc import Callable

from worker.boot_clock import now
from worker.lease import LeaseKeeper


def keeper(renew: Callable[[], bool], lease_seconds: float, heartbeat_seconds: float) -> tuple[LeaseKeeper, threading.Event]:
    lost = threading.Event()
    return LeaseKeeper(renew, lost.set, lease_seconds=lease_seconds, heartbeat_seconds=heartbeat_seconds, since=now()), lost


def test_renewing_keeps_it_past_its_length() -> None:
    calls: list[float] = []

    def renew() -> bool:
        calls.append(time.monotonic())
        return True

    lease, lost = keeper(renew, 0.3, 0.03)
    with lease:
        assert not lost.wait(0.8)
        assert not lease.is_lost
    assert len(calls) >= 5
    num_calls = len(calls)
    time.sleep(0.1)
    assert len(calls) == num_calls, "it must stop with the block"
    assert not lost.is_set(), "leaving the block is no loss"


def test_the_store_takes_it_away() -> None:
    lease, lost = keeper(lambda: False, 60, 0.01)
    with lease:
        assert lost.wait(2)
        assert lease.is_lost


def test_an_outage_shorter_than_the_lease_is_survived() -> None:
    outage_ends = time.monotonic() + 0.2

    def renew() -> bool:
        if time.monotonic() < outage_ends:
            raise ConnectionError("store away")
        return True

    lease, lost = keeper(renew, 0.8, 0.03)
    with lease:
        assert not lost.wait(1.2)


def test_an_outage_longer_than_the_lease_loses_it() -> None:
    def renew() -> bool:
        raise ConnectionError("store away")

    started = time.monotonic()
    lease, lost = keeper(renew, 0.2, 0.03)
    with lease:
        assert lost.wait(2)
    assert time.monotonic() - started > 0.15


def test_a_renewal_that_hangs_loses_it_too() -> None:
    go_on = threading.Event()
    lease, lost = keeper(lambda: go_on.wait(5), 0.2, 0.02)
    with lease:
        assert lost.wait(2)
        assert lease.is_lost
        go_on.set()
