"""The clock of leases and of health. It imports the standard library alone: probes and the guard of a lease start with it."""

from __future__ import annotations

import time


def now() -> float:
    """Seconds since the machine started. Nobody sets this clock, or what hangs could seem well for as long as it was set back; all
    processes of the machine share it; and it goes on while the machine sleeps."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)
