"""What the store refuses, each as a type of its own so that callers can tell them apart."""

from __future__ import annotations

from service.store.states import JobState


class StoreError(Exception):
    """Base of the store's refusals."""


class JobNotFoundError(StoreError):
    """There is no job of this id."""

    def __init__(self, job_id: str) -> None:
        super().__init__(f"there is no job {job_id!r}")
        self.job_id = job_id


class ArtifactNotFoundError(StoreError):
    """There is no artifact of this id."""

    def __init__(self, artifact_id: str) -> None:
        super().__init__(f"there is no artifact {artifact_id!r}")
        self.artifact_id = artifact_id


class KeyNotFoundError(StoreError):
    """There is no API key of this id."""

    def __init__(self, key_id: str) -> None:
        super().__init__(f"there is no API key {key_id!r}; `cliprd keys list` shows what there is")


class LeaseLostError(StoreError):
    """The caller no longer holds the job: its lease ran out and was taken away, or the job has finished. Nothing was written."""

    def __init__(self, job_id: str) -> None:
        super().__init__(f"the lease on job {job_id} is lost; this worker must stop and write nothing more")
        self.job_id = job_id


class JobFinishedError(StoreError):
    """The job has finished, so it can't be cancelled, paused or resumed."""

    def __init__(self, job_id: str, state: JobState) -> None:
        super().__init__(f"job {job_id} has finished already ({state})")
        self.job_id = job_id
        self.state = state


class JobConflictError(StoreError):
    """What was asked is not possible in the state the job is in."""

    def __init__(self, job_id: str, problem: str) -> None:
        super().__init__(f"job {job_id} {problem}")
        self.job_id = job_id


class IdempotencyConflictError(StoreError):
    """The idempotency key belongs to a submission of another spec, or to one whose job was deleted."""

    def __init__(self, key: str, job_id: str, *, is_deleted: bool = False) -> None:
        deleted = f"the key was used before, for job {job_id}, which was deleted"
        super().__init__(deleted if is_deleted else f"the key was used for another spec, which became job {job_id}")
        self.key = key
        self.job_id = job_id


class TeacherUnavailableError(StoreError):
    """The spec's teacher is a job or an artifact that can't be one."""

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(problem)
        self.field = field
        self.problem = problem


class InvalidCursorError(StoreError):
    """The cursor was not made by this service."""

    def __init__(self) -> None:
        super().__init__("the cursor is not one that an earlier page returned as `next_cursor`")
