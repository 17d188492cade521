"""A job's states and the one table of moves between them."""

from __future__ import annotations

from enum import StrEnum


class JobState(StrEnum):
    """Where a job is in its life."""

    WAITING = "waiting"
    """Its teacher is another job's result, and that job has not finished."""
    QUEUED = "queued"
    """Any worker of its queue may claim it."""
    RUNNING = "running"
    """One worker holds it under a lease."""
    PAUSED = "paused"
    """Put aside by a user, with its newest checkpoint; it goes on once it is resumed."""
    SUCCEEDED = "succeeded"
    """Trained, evaluated and exported."""
    FAILED = "failed"
    """Ended badly; `error` says why."""
    CANCELLED = "cancelled"
    """Ended because a user asked for it."""

    @property
    def is_finished(self) -> bool:
        """Whether the job has ended, one way or another."""
        return self in (JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED)


ALLOWED_MOVES: dict[JobState, frozenset[JobState]] = {
    JobState.WAITING: frozenset({JobState.QUEUED, JobState.PAUSED, JobState.FAILED, JobState.CANCELLED}),
    JobState.QUEUED: frozenset({JobState.RUNNING, JobState.PAUSED, JobState.CANCELLED}),
    JobState.RUNNING: frozenset({JobState.QUEUED, JobState.PAUSED, JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED}),
    JobState.PAUSED: frozenset({JobState.QUEUED, JobState.WAITING, JobState.FAILED, JobState.CANCELLED}),
    JobState.SUCCEEDED: frozenset(),
    JobState.FAILED: frozenset({JobState.QUEUED, JobState.WAITING}),
    JobState.CANCELLED: frozenset({JobState.QUEUED, JobState.WAITING}),
}
"""Every move there is; those from `failed` and `cancelled` are retries: from each state, the states that may follow."""
