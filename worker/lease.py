"""Keeps a job's lease alive from threads of its own, so that a long upload or a slow disk in the main thread cannot lose it."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Self

from worker.boot_clock import now

logger = logging.getLogger(__name__)

FIRST_RETRY_SECONDS = 0.5


class LeaseKeeper:
    """Context manager: renews now and then while the `with` block runs.

    The lease counts as lost when the store says so, or when it could not be renewed for as long as it lasts: from then on another
    worker may have the job. A second thread watches for that, since a renewal may hang in the network.

    Args:
        renew: Renews the lease in the store; False if it is not ours any more. Any exception means the store is out of reach.
        on_lost: Called once, from the watching thread, when the lease is lost.
        on_renewed: Called after each renewal with the moment from which the lease counts again, as `boot_clock.now` says.
        lease_seconds: How long the lease lasts without renewal.
        heartbeat_seconds: Pause between renewals.
        since: From when on the lease counts, as `boot_clock.now` says.
    """

    def __init__(
        self,
        renew: Callable[[], bool],
        on_lost: Callable[[], None],
        *,
        lease_seconds: float,
        heartbeat_seconds: float,
        since: float,
        on_renewed: Callable[[float], None] = lambda _: None,
    ) -> None:
        assert heartbeat_seconds < lease_seconds, "a lease must outlive the pause between its renewals"
        self._renew = renew
        self._on_lost = on_lost
        self._on_renewed = on_renewed
        self._lease_seconds = lease_seconds
        self._heartbeat_seconds = heartbeat_seconds
        self._is_taken = threading.Event()
        self._renewed_at = since
        self._done = threading.Event()
        self._threads = [threading.Thread(target=target, name="lease", daemon=True) for target in (self._keep, self._watch)]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._done.set()
        self._is_taken.set()  # wakes the watching thread
        for thread in self._threads:
            thread.join(self._heartbeat_seconds)  # a renewal that hangs must not hold up the end of the job

    @property
    def is_lost(self) -> bool:
        return self._is_taken.is_set() or now() - self._renewed_at > self._lease_seconds

    def _keep(self) -> None:
        pause = self._heartbeat_seconds
        while not self._done.wait(pause) and not self.is_lost:
            started = now()  # the store counts from later, so this errs on the safe side
            try:
                is_ours = self._renew()
            except Exception as error:
                pause = min(self._heartbeat_seconds, 2 * pause if pause < self._heartbeat_seconds else FIRST_RETRY_SECONDS)
                logger.warning("could not renew the lease (%s); trying again in %.1f s", error, pause)
                continue
            pause = self._heartbeat_seconds
            if not is_ours:
                self._is_taken.set()
                return
            self._renewed_at = started
            self._on_renewed(started)

    def _watch(self) -> None:
        while not self.is_lost:
            self._is_taken.wait(max(0.0, self._renewed_at + self._lease_seconds - now()) + 0.001)
        if not self._done.is_set():
            self._on_lost()
