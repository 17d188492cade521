"""Stores submissions and sends them to the workers: all that wait at once, in one transaction."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session, sessionmaker

from cliprd_core.spec import JobSpec
from service.batches import Batches
from service.queue import JobQueue
from service.store import jobs
from service.store.idempotency import Keyed, find_submitted, remember_keys
from service.store.jobs import QueuedJob
from service.store.models import Job
from service.store.session import OUT_OF_REACH
from service.store.states import JobState


@dataclass(frozen=True)
class Submission:
    """A spec that is to become a job."""

    resolved: JobSpec
    keyed: Keyed | None = None


class Submitted(NamedTuple):
    """The job of a submission."""

    job: Job
    is_replayed: bool
    """It was there before, under the same key."""


class Intake:
    """What a submission's way ends with, for a whole process."""

    def __init__(self, sessions: sessionmaker[Session], queue: JobQueue, *, max_attempts: int) -> None:
        self._sessions = sessions
        self._queue = queue
        self._max_attempts = max_attempts
        self._batches = Batches(self._take_all)

    async def take(self, submission: Submission) -> Submitted:
        """Store the submission's job and send it, unless one was submitted under its key before.

        Raises:
            TeacherUnavailableError: a teacher can't be had.
            IdempotencyConflictError: the key was used for another spec.
        """
        return await self._batches.do(submission)

    def _take_all(self, submissions: Sequence[Submission]) -> list[Submitted | Exception]:
        results = self._store_each(submissions)
        new = [one.job for one in results if isinstance(one, Submitted) and not one.is_replayed]
        self._queue.send([QueuedJob(job.id, job.queue) for job in new if job.state is JobState.QUEUED])
        return results

    def _store_each(self, submissions: Sequence[Submission]) -> list[Submitted | Exception]:
        """All in one transaction; where one of them can't be stored, each in its own."""
        try:
            return self._store(submissions)
        except OUT_OF_REACH as error:
            return [error for _ in submissions]
        except Exception as error:
            if len(submissions) > 1:
                return [result for one in submissions for result in self._store_each([one])]
            if not isinstance(error, IntegrityError):
                return [error]
        try:
            return self._store(submissions)  # someone was faster with the same key, whose job is found now
        except Exception as error:
            return [error]

    def _store(self, submissions: Sequence[Submission]) -> list[Submitted | Exception]:
        keys = [one.keyed for one in submissions if one.keyed is not None]
        with self._sessions.begin() as session:
            found = find_submitted(session=session, submissions=keys)
            new = [one for one in submissions if one.keyed is None or one.keyed not in found]
            created = jobs.create_jobs(session=session, specs=[one.resolved for one in new], max_attempts=self._max_attempts)
            keyed = [(one.keyed, job) for one, job in zip(new, created, strict=True) if one.keyed is not None]
            remember_keys(session=session, submissions=keyed)
        made = iter(created)
        results: list[Submitted | Exception] = []
        for one in submissions:
            earlier = None if one.keyed is None else found.get(one.keyed)
            if isinstance(earlier, Exception):
                results.append(earlier)
            else:
                results.append(Submitted(next(made), is_replayed=False) if earlier is None else Submitted(earlier, is_replayed=True))
        return results
