"""One training run as operating-system processes: start torchrun, stop it politely, kill all of it, say how it ended."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from cliprd_core.run_dir import ATTEMPT_VARIABLE, EXIT_CODE_STOPPED, LOG_FILE, SPEC_FILE
from service.die_with_parent import LAUNCHER, wrap
from worker.run_cookie import COOKIE_VARIABLE, kill_processes, new_cookie

logger = logging.getLogger(__name__)

DIE_WITH_PARENT_VARIABLE = "CLIPRD_DIE_WITH_PARENT"
MAX_TAIL_BYTES = 64 * 1024
MAX_TAIL_LINES = 60


def torchrun_command(num_processes: int, grace_seconds: float, trainer: Sequence[str]) -> list[str]:
    """torchrun on this machine with a free rendezvous port. It never restarts: an attempt is the service's notion, not torchrun's.

    `cliprd_core.torchrun` is torchrun with a shorter report of failed processes. `--shutdown-timeout` lies above the grace period, so that
    it is this supervisor who decides when politeness ends. The training processes are tied to torchrun's life from their first moment,
    which their own prctl would be too late for.
    """
    return [
        *(sys.executable, "-m", "cliprd_core.torchrun"),
        *("--standalone", f"--nproc-per-node={num_processes}", "--max-restarts=0"),
        *(f"--shutdown-timeout={int(grace_seconds) + 30}", "--no-python"),
        *wrap([sys.executable, "-u", *trainer], LAUNCHER),
    ]


def trainer_environment(attempt: int, num_processes: int) -> dict[str, str]:
    """The worker's environment plus what the contract with the trainer asks for.

    Threads are shared out over the processes unless OMP_NUM_THREADS is set: torch would give every process all cores.
    """
    environment = dict(os.environ)
    environment.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // num_processes)))
    return environment | {ATTEMPT_VARIABLE: str(attempt), DIE_WITH_PARENT_VARIABLE: "1"}


@dataclass(frozen=True)
class ExitReport:
    """How a run's processes ended, torchrun's word on the training processes included."""

    exit_code: int
    signal_number: int | None
    """The signal that killed a training process, or torchrun."""
    was_stopped: bool
    """It ended in good order after a SIGTERM."""
    last_lines: str


class TrainingProcess:
    """torchrun and everything below it. Create it in a thread that outlives it (see `die_with_parent`).

    Args:
        run: The run directory.
        command: What to start.
        environment: All of its environment, but for the cookie.
        cookie: Of this run alone (see `run_cookie`); a new one by default.
    """

    def __init__(self, run: Path, command: list[str], environment: dict[str, str], cookie: str | None = None) -> None:
        self._run = run
        self._cookie = cookie or new_cookie()
        self._log_path = run / LOG_FILE
        with self._log_path.open("ab") as log:
            self._log_start = log.tell()
            self._popen = subprocess.Popen(
                wrap(command),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment | {COOKIE_VARIABLE: self._cookie},
                start_new_session=True,
            )

    @classmethod
    def start(
        cls,
        run: Path,
        *,
        attempt: int,
        num_processes: int,
        grace_seconds: float,
        trainer: Sequence[str],
        environment: Mapping[str, str],
        cookie: str | None = None,
    ) -> TrainingProcess:
        """Start `trainer` (`-m MODULE` or a script) on the spec in `run`, one process per device, with `environment` on top."""
        command = torchrun_command(num_processes, grace_seconds, [*trainer, str(run / SPEC_FILE)])
        return cls(run, command, trainer_environment(attempt, num_processes) | dict(environment), cookie)

    @property
    def pid(self) -> int:
        return self._popen.pid

    def is_running(self) -> bool:
        return self._popen.poll() is None

    def terminate(self) -> None:
        """Ask the run to save a checkpoint and end: torchrun passes SIGTERM on to the training processes."""
        if self.is_running():
            self._popen.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """SIGKILL every process of the run, in whatever session, and wait until none is left."""
        if self.is_running():
            self._popen.kill()  # before it has its cookie, too
        survivors = kill_processes(self._cookie, lambda: not self.is_running())
        if survivors:
            logger.error("processes %s of the run in %s survive SIGKILL; they hang in the kernel", survivors, self._run)

    def wait(self, timeout_seconds: float) -> bool:
        """Wait for torchrun; True if it ended in time."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._popen.wait(timeout_seconds)
        return not self.is_running()

    def report(self) -> ExitReport:
        """How it ended; to be called once torchrun has."""
        exit_code = self._popen.returncode
        assert exit_code is not None, "the run has not ended"
        tail = self._log_tail()
        codes = [exit_code, *(int(code) for code in re.findall(r"exitcode\s*:\s*(-?\d+)", tail))]  # of each failed process
        killed_by = next((-code for code in codes if code < 0), None)
        was_stopped = EXIT_CODE_STOPPED in codes or f"got signal: {signal.SIGTERM.value}" in tail
        return ExitReport(exit_code, killed_by, was_stopped, "\n".join(tail.splitlines()[-MAX_TAIL_LINES:]))

    def _log_tail(self) -> str:
        with self._log_path.open("rb") as log:
            size = log.seek(0, os.SEEK_END)
            log.seek(max(self._log_start, size - MAX_TAIL_BYTES))
            return log.read().decode(errors="replace")
