"""What a run's files and its processes' end mean together."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from cliprd_core.failures import write_failure
from cliprd_core.run_dir import ErrorReason, ErrorRecord
from service.store.jobs import Cancelled
from worker.outcome import StopCause, decide, of_stopped
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


def stopped(run: Path, cause: StopCause, signal_number: int | None = None) -> object:
    return decide(run, ExitReport(exit_code=1, signal_number=signal_number, was_stopped=True, last_lines="last lines"), cause)


def test_an_error_that_comes_again_counts_on_a_pause_and_a_timeout(tmp_path: Path) -> None:
    error = ErrorRecord(reason=ErrorReason.DIVERGED, message="NaN at step 7")
    write_failure(tmp_path, error)
    assert stopped(tmp_path, StopCause.PAUSE) == error
    assert stopped(tmp_path, StopCause.TIMEOUT) == error
    assert stopped(tmp_path, StopCause.CANCEL) == Cancelled()
    assert stopped(tmp_path, StopCause.SHUTDOWN) is None


def test_an_error_that_may_pass_does_not(tmp_path: Path) -> None:
    write_failure(tmp_path, ErrorRecord(reason=ErrorReason.WORKER_LOST, message="a process is gone"))
    assert stopped(tmp_path, StopCause.PAUSE) is None
    timeout = stopped(tmp_path, StopCause.TIMEOUT)
    assert isinstance(timeout, ErrorRecord)
    assert timeout.reason is ErrorReason.TIMEOUT


@pytest.mark.parametrize(("signal_number", "how"), [(None, "and was stopped. Retry"), (signal.SIGKILL, "and was killed before it")])
def test_a_timeout_says_how_the_run_ended(tmp_path: Path, signal_number: int | None, how: str) -> None:
    timeout = stopped(tmp_path, StopCause.TIMEOUT, signal_number)
    assert isinstance(timeout, ErrorRecord)
    assert how in timeout.message
    assert "newest checkpoint" in timeout.message


def test_a_timeout_before_the_run_started_is_one_too() -> None:
    outcome = of_stopped(StopCause.TIMEOUT)
    assert isinstance(outcome, ErrorRecord)
    assert outcome.reason is ErrorReason.TIMEOUT
    assert "was stopped" in outcome.message
    assert of_stopped(StopCause.PAUSE) is of_stopped(StopCause.SHUTDOWN) is None
