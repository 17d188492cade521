"""Run a command that the kernel kills when its parent dies: `python die_with_parent.py PARENT COMMAND [ARGUMENT…]`.

A program of its own rather than a `preexec_fn`, because that would run Python between fork and exec of a process with threads,
which can deadlock. It imports the standard library only and starts in some 30 ms with `python -I -S`. Linux only (prctl).

PARENT is the process id of whoever starts this, or `launcher`: then it is the process that an outer `die_with_parent` became. So a
launcher such as torchrun can be wrapped, and what it starts too, with no moment in which either could be orphaned.

The kernel sends the signal when the *thread* that started this process ends, so start it from a thread that lives as long as the
command may run; the main thread is the safe choice.
"""

import ctypes
import os
import signal
import sys
from pathlib import Path

PR_SET_PDEATHSIG = 1  # linux/prctl.h
LAUNCHER = "launcher"
LAUNCHER_VARIABLE = "CLIPRD_LAUNCHER_PID"


def wrap(command: list[str], parent: str | None = None) -> list[str]:
    """`command` such that it dies with its parent: this process, or LAUNCHER. The promise survives the exec (prctl(2))."""
    return [sys.executable, "-I", "-S", str(Path(__file__).resolve()), parent or str(os.getpid()), *command]


def die_with_parent(parent: int) -> None:
    """From here on the kernel kills this process when its parent, whose process id is given, dies. It exits if that has happened."""
    if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        sys.exit(f"prctl(PR_SET_PDEATHSIG) failed: {os.strerror(ctypes.get_errno())}")
    if os.getppid() != parent:
        sys.exit("the parent died before the command started")  # before the promise was made, so no signal will come


def main() -> None:
    parent = os.environ[LAUNCHER_VARIABLE] if sys.argv[1] == LAUNCHER else sys.argv[1]
    command = sys.argv[2:]
    die_with_parent(int(parent))
    os.execvpe(command[0], command, os.environ | {LAUNCHER_VARIABLE: str(os.getpid())})  # noqa: S606  (no shell is what we want)


if __name__ == "__main__":
    main()
