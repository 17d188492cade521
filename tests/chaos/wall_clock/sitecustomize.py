"""Python imports this at its start from PYTHONPATH: `time.sleep` for processes whose wall clock libfaketime moves. Told to leave the
monotonic clock alone, version 0.9.10 makes the system call behind the standard one fail (EINVAL)."""

import select
import time
from typing import SupportsIndex


def sleep(seconds: SupportsIndex | float) -> None:
    select.select([], [], [], float(seconds))


time.sleep = sleep
