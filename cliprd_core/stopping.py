"""Stopping early and dying together: SIGTERM as a request, and a kernel's promise that no rank outlives its launcher.

Nothing here loads torch, so that the signal is honoured from the first moment of the process.
"""

from __future__ import annotations

import ctypes
import os
import signal
from types import FrameType

DIE_WITH_PARENT_VARIABLE = "CLIPRD_DIE_WITH_PARENT"
"""Set to 1, the process is killed when the one that started it ends, however that ends (Linux only)."""

_PR_SET_PDEATHSIG = 1


class StopRequest:
    """Whether this process was asked to stop. Repeated signals change nothing."""

    def __init__(self) -> None:
        self.requested = False

    def listen(self) -> StopRequest:
        """Turn SIGTERM into a request from now on; returns itself. Main thread only."""
        signal.signal(signal.SIGTERM, self._on_signal)
        return self

    def _on_signal(self, _number: int, _frame: FrameType | None) -> None:
        self.requested = True


def die_with_parent_if_asked() -> None:
    """Honour `CLIPRD_DIE_WITH_PARENT`: have the kernel send SIGKILL to this process once its parent is gone.

    Raises:
        OSError: the kernel refused.
    """
    if os.environ.get(DIE_WITH_PARENT_VARIABLE) != "1":
        return
    parent = os.getppid()
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    if os.getppid() != parent:  # it ended before the promise was made
        os.kill(os.getpid(), signal.SIGKILL)
