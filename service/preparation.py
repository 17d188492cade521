"""Checks submissions before anything is stored: all that wait at once together, since those of one sweep name the same files."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from sqlalchemy.orm import Session, sessionmaker

from cliprd_core.spec import JobSpec
from service.batches import Batches
from service.intake import Submission, Submitted
from service.looks import Looks
from service.problems import SpecError
from service.settings import Settings
from service.spec_check import check_spec, check_values
from service.store.errors import IdempotencyConflictError
from service.store.idempotency import Keyed, digest, find_submitted
from service.store.session import reading

MAX_CALLS = 4
"""At once: more than of what asks the database alone, as a file server may be slow to answer for one spec's files."""


class _Given(NamedTuple):
    spec: JobSpec
    key: str | None


class Preparation:
    """What a submission's way begins with, for a whole process."""

    def __init__(self, settings: Settings, sessions: sessionmaker[Session]) -> None:
        self._settings = settings
        self._sessions = sessions
        self._batches: Batches[_Given, Submission | Submitted] = Batches(self._prepare_all, max_calls=MAX_CALLS)

    @property
    def is_busy(self) -> bool:
        """Whether any submission is being checked."""
        return self._batches.is_busy

    async def prepare(self, spec: JobSpec, key: str | None) -> Submission | Submitted:
        """What is to be stored; or the job that was stored under this key before, if what the spec names is not there any more.

        Raises:
            SpecError: the spec has faults, or names what jobs may not read.
            IdempotencyConflictError: so it has, and the key was used for another spec.
        """
        return await self._batches.do(_Given(spec, key))

    def check(self, spec: JobSpec) -> JobSpec:
        """The spec as it runs.

        Raises:
            SpecError: it has faults, or names what jobs may not read.
        """
        [resolved] = self._check_all([spec])
        if isinstance(resolved, Exception):
            raise resolved
        return resolved

    def _check_all(self, specs: Sequence[JobSpec]) -> list[JobSpec | Exception]:
        settings, looks = self._settings, Looks()
        locations = settings.locations
        results: list[JobSpec | Exception] = []
        for spec in specs:
            try:
                results.append(
                    check_spec(spec, data_root=settings.data_root, locations=locations, check_files=settings.check_files, looks=looks)
                )
            except Exception as error:  # whatever it is, it is no fault of the others
                results.append(error)
        return results

    def _prepare_all(self, given: Sequence[_Given]) -> list[Submission | Submitted | Exception]:
        resolved = self._check_all([one.spec for one in given])
        return [self._prepared(one, result) for one, result in zip(given, resolved, strict=True)]

    def _prepared(self, given: _Given, resolved: JobSpec | Exception) -> Submission | Submitted | Exception:
        if isinstance(resolved, JobSpec):
            return Submission(resolved, None if given.key is None else Keyed(given.key, digest(given.spec)))
        if given.key is None or not isinstance(resolved, SpecError):
            return resolved
        try:
            check_values(given.spec)  # what has no JSON can't be compared with what was sent before
        except SpecError as error:
            return error
        keyed = Keyed(given.key, digest(given.spec))
        with reading(self._sessions) as session:
            earlier = find_submitted(session=session, submissions=[keyed]).get(keyed)
        if earlier is None:
            return resolved
        return earlier if isinstance(earlier, IdempotencyConflictError) else Submitted(earlier, is_replayed=True)
