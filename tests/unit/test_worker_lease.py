"""The lease keeper: renews by itself, retries while the store is away, and knows when the lease must count as lost."""

import threading
from collections.abc import Callable

import pytest

from worker.boot_clock import now
from worker.lease import LeaseKeeper

TIMEOUT_SECONDS = 60.0


class Renewals:
    """Of a lease of 60 s, each of which takes 15 s of a clock that stands still otherwise; the first `num_failing` fail."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, num_failing: int = 0) -> None:
        self.now = 1000.0
        self.num_calls = 0
        self.reached = threading.Event()
        """There were ten."""
        self._num_failing = num_failing
        monkeypatch.setattr("worker.lease.now", lambda: self.now)
        self.lost = threading.Event()
        self.lease = LeaseKeeper(self._renew, self.lost.set, lease_seconds=60, heartbeat_seconds=0.01, since=self.now)

    def _renew(self) -> bool:
        self.num_calls += 1
        self.now += 15.0
        if self.num_calls == 10:
            self.reached.set()
        if self.num_calls <= self._num_failing:
            raise ConnectionError("store away")
        return True


def keeper(renew: Callable[[], bool], lease_seconds: float, heartbeat_seconds: float) -> tuple[LeaseKeeper, threading.Event]:
    lost = threading.Event()
    return LeaseKeeper(renew, lost.set, lease_seconds=lease_seconds, heartbeat_seconds=heartbeat_seconds, since=now()), lost


def test_renewing_keeps_it_past_its_length(monkeypatch: pytest.MonkeyPatch) -> None:
    renewals = Renewals(monkeypatch)
    with renewals.lease as lease:
        assert renewals.reached.wait(TIMEOUT_SECONDS)
        assert not lease.is_lost
    for thread in lease._threads:
        thread.join(TIMEOUT_SECONDS)
        assert not thread.is_alive(), "it must stop with the block"
    assert not renewals.lost.is_set(), "leaving the block is no loss"


def test_the_store_takes_it_away() -> None:
    lease, lost = keeper(lambda: False, 60, 0.01)
    with lease:
        assert lost.wait(TIMEOUT_SECONDS)
        assert lease.is_lost


def test_an_outage_shorter_than_the_lease_is_survived(monkeypatch: pytest.MonkeyPatch) -> None:
    renewals = Renewals(monkeypatch, num_failing=2)
    with renewals.lease as lease:
        assert renewals.reached.wait(TIMEOUT_SECONDS)
        assert not lease.is_lost
    assert not renewals.lost.is_set()


def test_an_outage_longer_than_the_lease_loses_it() -> None:
    def renew() -> bool:
        raise ConnectionError("store away")

    started = now()
    lease, lost = keeper(renew, 0.2, 0.03)
    with lease:
        assert lost.wait(TIMEOUT_SECONDS)
    assert now() - started >= 0.2


def test_a_renewal_that_hangs_loses_it_too() -> None:
    go_on = threading.Event()
    lease, lost = keeper(lambda: go_on.wait(2 * TIMEOUT_SECONDS), 0.2, 0.02)
    with lease:
        assert lost.wait(TIMEOUT_SECONDS)
        assert lease.is_lost
        go_on.set()
