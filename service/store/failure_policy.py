"""What follows from each way a run can fail: whether it is tried again, how often and after how long. The one table of it.

A cancelled job is never tried again by itself; `retry` by a user is always possible, and goes on from the newest checkpoint.
"""

from __future__ import annotations

from dataclasses import dataclass

from cliprd_core.run_dir import ErrorReason, ErrorRecord

DEFAULT_MAX_ATTEMPTS = 3
"""Attempts at a job that may fail for a reason that is retried, over all such reasons together, before the job fails of the last one. Those
before one that stored a checkpoint further on than any don't count: a week's job outlives any number of power cuts if it gets on between
them. A service's own number (`CLIPRD_MAX_ATTEMPTS`) is noted on each job when it is submitted."""


@dataclass(frozen=True)
class FailurePolicy:
    """What becomes of a job whose run failed for some reason."""

    is_retried: bool
    """Queued again by itself, unless this was the job's `max_attempts`-th attempt that failed so, since its last retry by a user or
    its last checkpoint further on."""
    delay_seconds: float
    """From the failure to the time it may start again."""
    what_to_do: str
    """For the user of a job that failed of it, after what the failure itself advises."""


FAILURE_POLICIES: dict[ErrorReason, FailurePolicy] = {
    ErrorReason.INVALID_SPEC: FailurePolicy(False, 0, "Correct the field that the message names: clone the job with it, or submit anew."),
    ErrorReason.INVALID_DATA: FailurePolicy(False, 0, "Mend the files that the message names, then retry the job."),
    ErrorReason.OUT_OF_MEMORY: FailurePolicy(False, 0, "Clone the job with a change that needs less memory."),
    ErrorReason.DIVERGED: FailurePolicy(False, 0, "Clone the job with a lower `training.learning_rate` or a longer warm-up."),
    ErrorReason.TEACHER_UNAVAILABLE: FailurePolicy(False, 0, "Retry the teacher's job and then this one, or clone it with another one."),
    ErrorReason.WORKER_LOST: FailurePolicy(True, 0, "Look at the worker's log for why it ended, then retry the job."),
    ErrorReason.DISK_FULL: FailurePolicy(True, 300, "Free space on the worker's disk, then retry the job."),
    ErrorReason.TIMEOUT: FailurePolicy(False, 0, "Retry the job for as many hours again."),
    ErrorReason.INTERNAL: FailurePolicy(False, 0, "Look at `detail`; retry the job if it is a passing fault, else report it."),
}


def what_to_do(error: ErrorRecord) -> str:
    """For the user of a job that failed so: first what this very failure advises, then what its reason always calls for."""
    return f"{error.advice} {FAILURE_POLICIES[error.reason].what_to_do}".strip()
