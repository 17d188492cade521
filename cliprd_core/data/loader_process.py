"""What makes a data-loading process a good child: deaf to the signals of its group, and never outliving its parent."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)
PR_SET_PDEATHSIG = 1  # linux/prctl.h


@dataclass(frozen=True)
class ChildInit:
    """Runs first in every loader process (`worker_init_fn`).

    A run is stopped by SIGTERM to its process group, and then still trains its step and saves. Loader processes that died of the
    same signal would make the trainer fail before its checkpoint, so they ignore it, and end when the trainer ends them or dies.
    """

    parent: int  # process id

    def __call__(self, worker_number: int) -> None:
        del worker_number
        for stop_signal in STOP_SIGNALS:
            signal.signal(stop_signal, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
        if sys.platform == "linux":
            # Elsewhere torch's own check of the parent, every few seconds, has to do.
            if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL) != 0:
                raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
            if os.getppid() != self.parent:  # it died before the line above
                os._exit(1)


@contextlib.contextmanager
def stop_signals_held() -> Iterator[None]:
    """Hold SIGTERM and SIGINT back while children are forked, since they inherit the mask: none can be hit before `ChildInit` ran."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
