"""Stores submissions: all that wait at once, in one transaction."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session, sessionmaker

from cliprd_core.spec import JobSpec
from service.batches import Batches
from service.store import jobs
from service.store.idempotency import Keyed, find_submitted, remember_keys
from service.store.models import Job
from service.store.session import OUT_OF_REACH, is_deadlock

PAUSES_SECONDS = (0.05, 0.2, 0.5)
"""Up to so long it waits before it tries again what was ended because of others, each time."""


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
    """Where all submissions of a process are stored."""

    def __init__(self, sessions: sessionmaker[Session], *, max_attempts: int) -> None:
        self._sessions = sessions
        self._max_attempts = max_attempts
        self._batches = Batches(self._store_each)

    @property
    def is_busy(self) -> bool:
        """Whether any submission is being stored."""
        return self._batches.is_busy

    async def take(self, submission: Submission) -> Submitted:
        """Store the submission's job, unless one was submitted under its key before.

        Raises:
            TeacherUnavailableError: a teacher can't be had.
            IdempotencyConflictError: the key was used for another spec.
        """
        return await self._batches.do(submission)

    def _store_each(self, submissions: Sequence[Submission]) -> list[Submitted | Exception]:
        """All in one transaction; where one of them can't be stored, each in its own."""
        try:
            return self._store_again(submissions)
        except Exception as error:
            if len(submissions) == 1 or isinstance(error, OUT_OF_REACH):
                return [error for _ in submissions]
        return [result for one in submissions for result in self._store_each([one])]

    def _store_again(self, submissions: Sequence[Submission]) -> list[Submitted | Exception]:
        """As `_store`, again where others were in the way: who was faster with the same key, and whose job is found the next time; or who
        waits for what we have, and we for theirs. That may come twice, as who waited for us need not have it before our next try."""
        for pause_seconds in PAUSES_SECONDS:
            try:
                return self._store(submissions)
            except Exception as error:
                if not is_deadlock(error) and not (len(submissions) == 1 and isinstance(error, IntegrityError)):
                    raise
            time.sleep(random.uniform(0, pause_seconds))  # noqa: S311
        return self._store(submissions)

    def _store(self, submissions: Sequence[Submission]) -> list[Submitted | Exception]:
        keys = [one.keyed for one in submissions if one.keyed is not None]
        with self._sessions.begin() as session:
            found = find_submitted(session=session, submissions=keys)
            new = [one for one in submissions if one.keyed is None or one.keyed not in found]
            created = jobs.create_jobs(session=session, specs=[one.resolved for one in new], max_attempts=self._max_attempts)
            made = [(one.keyed, job) for one, job in zip(new, created, strict=True) if isinstance(job, Job)]
            remember_keys(session=session, submissions=[(keyed, job) for keyed, job in made if keyed is not None])
        of_new = iter(created)
        results: list[Submitted | Exception] = []
        for one in submissions:
            earlier = None if one.keyed is None else found.get(one.keyed)
            result = next(of_new) if earlier is None else earlier
            results.append(Submitted(result, is_replayed=earlier is not None) if isinstance(result, Job) else result)
        return results
