"""What a run's files and its processes' end mean for the job."""

from __future__ import annotations

import errno
import os
import signal
from enum import Enum, auto
from pathlib import Path

from cliprd_core.run_dir import ERROR_FILE, RESULT_FILE, ErrorReason, ErrorRecord, ResultRecord, read_record
from service.store.failure_policy import FAILURE_POLICIES, what_to_do
from service.store.jobs import Cancelled, Outcome
from worker.process import ExitReport


class StopCause(Enum):
    """Why the supervisor asked a run to stop."""

    CANCEL = auto()
    """A user asked for it."""
    PAUSE = auto()
    """A user asked to put the job aside; it goes on later, here or elsewhere."""
    TIMEOUT = auto()
    """It ran for as long as its spec allows."""
    SHUTDOWN = auto()
    """The worker was told to stop; another one shall go on with the job."""


class StopAskedError(Exception):
    """The run is to stop while no training runs: before it, as files are fetched, or after it, as they are stored. What was waited for,
    if anything, is the error's context.
    """

    def __init__(self, cause: StopCause) -> None:
        super().__init__(cause.name)
        self.cause = cause


def decide(run: Path, report: ExitReport, cause: StopCause | None) -> Outcome | None:
    """How the job ended, or None if it did not and is to be given back.

    A result counts even if the run had been asked to stop: it came too late. So does, on a pause or a timeout, an error that another
    attempt would meet again. A run that ended in good order after a SIGTERM which did not come from us (a system that shuts down sends it
    to everyone) is given back too.
    """
    result = read_record(run / RESULT_FILE, ResultRecord)
    if result is not None:
        return result
    error = read_record(run / ERROR_FILE, ErrorRecord)
    if cause is not None:
        return of_stopped(cause, report, error)
    if error is not None and not _is_of_a_killed_neighbour(error, report):
        return error
    if report.was_stopped:
        return None
    return explain(report)


def of_interrupted(stop: StopAskedError) -> Outcome | None:
    """How a job ended that was asked to stop while it fetched or stored files, or None if it did not."""
    waited_for = stop.__context__
    return of_stopped(stop.cause, waited_for="" if waited_for is None else f", in the end for the artifact store ({waited_for}),")


def of_stopped(
    cause: StopCause, report: ExitReport | None = None, error: ErrorRecord | None = None, *, waited_for: str = ""
) -> Outcome | None:
    """How a job ended whose run was asked to stop and has no result, or None if it did not. On a shutdown, another worker shall find out.

    Args:
        report: How the run's processes ended; None: none ran.
        error: What the run left.
        waited_for: Said of a timeout: what took the time, when it was not the training.
    """
    if cause is StopCause.CANCEL:
        return Cancelled()
    if cause is StopCause.SHUTDOWN:
        return None
    if error is not None and not FAILURE_POLICIES[error.reason].is_retried:
        return error
    return None if cause is StopCause.PAUSE else _timeout(report, waited_for)


def _timeout(report: ExitReport | None, waited_for: str) -> ErrorRecord:
    how = "was stopped"
    if report is not None and report.signal_number == signal.SIGKILL:
        how = "was killed before it had stopped, most likely as saving takes longer than the worker's `CLIPRD_GRACE_SECONDS`"
    message = (
        f"The job ran for `resources.max_hours`{waited_for} and {how}. Retry it, and it goes on from its newest checkpoint for as long"
        " again; or clone it with a higher limit."
    )
    return ErrorRecord(reason=ErrorReason.TIMEOUT, message=message, detail=report.last_lines if report is not None else "")


def _is_of_a_killed_neighbour(error: ErrorRecord, report: ExitReport) -> bool:
    """Whether the error only says that another process is gone, and a signal ended that one. (torchrun sends SIGTERM to the rest.)"""
    return error.reason is ErrorReason.WORKER_LOST and report.signal_number not in (None, signal.SIGTERM)


def last_words(error: ErrorRecord, attempt: int, *, is_last_attempt: bool) -> str:
    """What the log of a failed run ends with: its last lines may be of processes that only failed of the first one's absence.

    Args:
        error: Why it failed.
        attempt: Which it was.
        is_last_attempt: Whether the job fails of it even if the reason is one that is tried again.
    """
    is_final = is_last_attempt or not FAILURE_POLICIES[error.reason].is_retried
    advice = f"\nWhat to do: {what_to_do(error)}" if is_final else ""
    return f"Attempt {attempt} failed: {error.reason}: {error.message}{advice}\n"


def explain(report: ExitReport) -> ErrorRecord:
    """The error of a run that died without a word."""
    if os.strerror(errno.ENOSPC) in report.last_lines:  # where not even the error could be written
        message = "A disk of the worker is full; the log's last lines are in `detail`. Free space under its `CLIPRD_RUNS_ROOT`."
        return ErrorRecord(reason=ErrorReason.DISK_FULL, message=message, detail=report.last_lines)
    if report.signal_number == signal.SIGKILL:
        message = (
            "The training process was killed (SIGKILL), most likely because the machine ran out of memory."
            " Lower `training.global_batch_size` or `training.num_data_workers`, or use a worker with more memory."
        )
        return ErrorRecord(reason=ErrorReason.WORKER_LOST, message=message, detail=report.last_lines)
    if report.signal_number is not None:
        name = signal.Signals(report.signal_number).name
        message = f"The training process was ended by {name}. The log's last lines are in `detail`."
    else:
        message = f"The training process ended with exit code {report.exit_code} and left no error. The log's last lines are in `detail`."
    return ErrorRecord(reason=ErrorReason.INTERNAL, message=message, detail=report.last_lines)
