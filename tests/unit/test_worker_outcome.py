"""What a run's files and its processes' end mean together."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from cliprd_core.failures import write_failure
from cliprd_core.run_dir import ErrorReason, ErrorRecord
from worker.outcome import decide
from worker.process import ExitReport


def decided(run: Path, left: ErrorReason, signal_number: int | None) -> ErrorRecord:
    write_failure(run, ErrorRecord(reason=left, message="left by a process of the run"))
    outcome = decide(run, ExitReport(exit_code=1, signal_number=signal_number, was_stopped=False, last_lines="last lines"), None)
    assert isinstance(outcome, ErrorRecord)
    return outcome


def test_how_a_process_was_killed_says_more_than_that_it_is_missed(tmp_path: Path) -> None:
    error = decided(tmp_path, ErrorReason.WORKER_LOST, signal.SIGKILL)
    assert error.reason is ErrorReason.WORKER_LOST
    assert "ran out of memory" in error.message


@pytest.mark.parametrize(
    ("left", "signal_number"),
    [
        (ErrorReason.WORKER_LOST, None),
        (ErrorReason.WORKER_LOST, signal.SIGTERM),  # torchrun's, to those that were left
        (ErrorReason.DIVERGED, signal.SIGKILL),
    ],
)
def test_otherwise_the_word_of_the_process_counts(tmp_path: Path, left: ErrorReason, signal_number: int | None) -> None:
    assert decided(tmp_path, left, signal_number) == ErrorRecord(reason=left, message="left by a process of the run")
