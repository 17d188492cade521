"""A claimed job: the store's functions bound to its id and lease token, with the store's absences told from its refusals."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TypeVar

from sqlalchemy.exc import InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.orm import Session, sessionmaker

from cliprd_core.run_dir import EvaluationRecord, MetricsRecord, ResultRecord
from cliprd_core.spec import JobSpec
from service.store.artifacts import are_registered, list_artifacts, register_artifacts, remove_artifacts
from service.store.blobs import Blobs, BlobsRefusedError, BlobsUnreachableError, StoredBlob, new_key
from service.store.jobs import (
    Claim,
    JobNotFoundError,
    JobState,
    LeaseLostError,
    Outcome,
    QueuedJob,
    finish_job,
    get_job,
    mark_started,
    record_checkpoint,
    record_evaluations,
    record_metrics,
    release_job,
    renew_lease,
)
from service.store.kinds import ArtifactKind
from service.store.logs import append_log
from service.store.models import Artifact
from service.store.session import reading
from service.store.transitions import num_lost_attempts
from service.store.unneeded_blobs import note_unneeded
from worker.outcome import StopCause

logger = logging.getLogger(__name__)

OUT_OF_REACH = (OperationalError, InterfaceError, PoolTimeoutError, BlobsUnreachableError)
"""What the store raises when it cannot be reached just now, or is too busy: worth another try."""

EXPORT_GROUP = "export"
MAX_RETRY_SECONDS = 5.0
PAGE_SIZE = 100

AnyResult = TypeVar("AnyResult")


class DamagedExportError(Exception):
    """A file of the exported model has changed since it was written; the message is for the user."""

    def __init__(self, file: Path) -> None:
        super().__init__(
            f"The exported {file.name} does not match the SHA-256 that it was written with: a disk or the memory of the worker's machine is"
            " faulty. Have the machine looked at, then retry the job, which exports again from its newest checkpoint."
        )


class HeldJob:
    """What the supervisor does to its job in the store. Every write raises LeaseLostError once the lease is gone.

    `record_…`, `append_log`, `renew` and `requested_stop` raise one of OUT_OF_REACH at once; their callers try again in their own time.
    All other methods keep trying for as long as the lease is held.

    Args:
        claim: How the job was claimed.
        sessions: The database's.
        blobs: The artifact store.
        lease_seconds: For which each renewal asks, as the claim did.
        held_since: When the claim began, as `boot_clock.now` says: from then on the lease counts.
    """

    def __init__(self, claim: Claim, sessions: sessionmaker[Session], blobs: Blobs, *, lease_seconds: float, held_since: float) -> None:
        self.id = claim.job.id
        self.attempt = claim.attempt
        self.is_last_attempt = num_lost_attempts(claim.job) >= claim.job.max_attempts
        """Whether the job fails if this attempt does, for whatever reason."""
        self.spec = JobSpec.model_validate(claim.job.spec)
        self.seconds_left = float("inf")
        """For which it may still run; not counted down."""
        if self.spec.resources.max_hours is not None:
            self.seconds_left = 3600 * self.spec.resources.max_hours - claim.job.seconds_run
        self.blobs = blobs
        self.held_since = held_since
        self.is_lost: Callable[[], bool] = lambda: False
        """Set by whoever keeps the lease."""
        self.check_stop: Callable[[], None] = lambda: None
        """Raises where the run is to stop. Asked while files are fetched or stored, which may take long; set by the supervisor."""
        self.tell: Callable[[str], None] = lambda _: None
        """Adds to the job's log; set by the supervisor."""
        self._token = claim.lease_token
        self._sessions = sessions
        self._lease_seconds = lease_seconds

    def renew(self) -> bool:
        """Whether the lease is still held."""
        with self._sessions.begin() as session:
            return renew_lease(session=session, job_id=self.id, lease_token=self._token, lease_seconds=self._lease_seconds)

    def requested_stop(self) -> StopCause | None:
        """What users want of the run."""
        with reading(self._sessions) as session:
            job = get_job(session=session, job_id=self.id)
        if job.cancel_requested_at is not None:
            return StopCause.CANCEL
        return StopCause.PAUSE if job.pause_requested_at is not None else None

    def record_metrics(self, records: Sequence[MetricsRecord]) -> None:
        with self._sessions.begin() as session:
            record_metrics(session=session, job_id=self.id, lease_token=self._token, records=records)

    def record_evaluations(self, records: Sequence[EvaluationRecord]) -> None:
        with self._sessions.begin() as session:
            record_evaluations(session=session, job_id=self.id, lease_token=self._token, records=records)

    def append_log(self, text: str) -> None:
        with self._sessions.begin() as session:
            append_log(session=session, job_id=self.id, lease_token=self._token, text=text)

    def mark_started(self) -> None:
        self._persist(lambda session: mark_started(session=session, job_id=self.id, lease_token=self._token))

    def finish(self, outcome: Outcome, export_files: Sequence[Path] = ()) -> list[QueuedJob]:
        """Record the outcome together with the exported files, so that a succeeded job has its model and no other job has one.

        A job that succeeded needs its mirrored checkpoints no more; those of jobs that ended otherwise are dropped by the reaper.

        Raises:
            StopAskedError: the run is to stop, and the artifact store does not take the files.
            DamagedExportError: one of the files is not what the trainer wrote.
        """
        stored: list[tuple[str, StoredBlob]] = []
        is_success = isinstance(outcome, ResultRecord)
        hashes = outcome.export_sha256 if isinstance(outcome, ResultRecord) else {}

        def write(session: Session) -> tuple[list[QueuedJob], list[str]]:
            if stored:
                self._register(session, stored, kind=ArtifactKind.MODEL, group=EXPORT_GROUP)
            dropped = self._drop_checkpoints(session, ArtifactKind.CHECKPOINT, keep_groups=()) if is_success else []
            return finish_job(session=session, job_id=self.id, lease_token=self._token, outcome=outcome), dropped

        try:
            for file in export_files:
                stored.append((file.name, self.put_file_patiently(file)))
                _check_hash(file, stored[-1][1], hashes.get(file.name))
            queued, dropped = self._persist(write)
        except BaseException as error:
            if isinstance(error, LeaseLostError) and self._has_succeeded():
                return []  # a reaper sends the messages of jobs that waited for this one, and deletes the checkpoints
            self.discard([blob for _, blob in stored])
            raise
        self._delete_blobs(dropped)
        return queued

    def _has_succeeded(self) -> bool:
        """Whether this attempt's success is recorded, which nobody else can do: the acknowledgement of its commit was lost."""
        with suppress(JobNotFoundError, *OUT_OF_REACH), reading(self._sessions) as session:
            job = get_job(session=session, job_id=self.id)
            return (job.state, job.attempt) == (JobState.SUCCEEDED, self.attempt)
        return False

    def discard(self, stored: Sequence[StoredBlob]) -> None:
        """Delete bytes that were stored to be made known, unless they are."""
        keys = [blob.key for blob in stored]
        if keys and not self._may_be_known(keys):
            self._delete_blobs(keys)

    def _may_be_known(self, storage_keys: Sequence[str]) -> bool:
        """Whether a commit whose acknowledgement never arrived may have gone through: then the bytes must stay."""
        try:
            with reading(self._sessions) as session:
                return are_registered(session=session, storage_keys=storage_keys)
        except OUT_OF_REACH:
            return True

    def _drop_checkpoints(self, session: Session, kind: ArtifactKind, keep_groups: Sequence[str]) -> list[str]:
        return remove_artifacts(session=session, job_id=self.id, lease_token=self._token, kind=kind, keep_groups=keep_groups)

    def release(self) -> QueuedJob | None:
        """Give the job back; None if it was to be cancelled or paused, so that it is not queued."""
        return self._persist(lambda session: release_job(session=session, job_id=self.id, lease_token=self._token))

    def artifacts(self, job_id: str, kind: ArtifactKind, group: str | None = None) -> list[Artifact]:
        """All artifacts of a kind of any job, newest first."""

        def read(session: Session) -> list[Artifact]:
            found: list[Artifact] = []
            cursor = None
            while True:
                page = list_artifacts(session=session, job_id=job_id, kind=kind, group=group, limit=PAGE_SIZE, cursor=cursor)
                found += page.rows
                cursor = page.next_cursor
                if cursor is None:
                    return found

        return self.read(read)

    def add_checkpoint(
        self, kind: ArtifactKind, group: str, step: int, stored: Sequence[tuple[str, StoredBlob]], keep_groups: Sequence[str]
    ) -> None:
        """Make a mirrored checkpoint known, all files at once, and forget those of its kind outside `keep_groups`."""
        replaced = [artifact.storage_key for artifact in self.artifacts(self.id, kind, group)]

        def write(session: Session) -> list[str]:
            self._register(session, stored, kind=kind, group=group, step=step)
            if kind is ArtifactKind.CHECKPOINT:
                record_checkpoint(session=session, job_id=self.id, lease_token=self._token, step=step)
            return self._drop_checkpoints(session, kind, keep_groups)

        self._delete_blobs([*self._persist(write), *replaced])

    def read(self, query: Callable[[Session], AnyResult]) -> AnyResult:
        """The answer to a query, which the store's absence only delays."""

        def attempt() -> AnyResult:
            with reading(self._sessions) as session:
                return query(session)

        return self.patiently(attempt)

    def _register(
        self, session: Session, stored: Sequence[tuple[str, StoredBlob]], *, kind: ArtifactKind, group: str, step: int | None = None
    ) -> None:
        files = dict(stored)
        register_artifacts(session=session, job_id=self.id, lease_token=self._token, kind=kind, group=group, files=files, step=step)

    def _delete_blobs(self, keys: Sequence[str]) -> None:
        """Of bytes that nothing names. What cannot be deleted is logged: it only takes space, and what was written before stands."""
        for key in keys:
            try:
                self.blobs.delete(key)
            except OSError as error:
                logger.warning("job %s: the artifact store keeps %s, which nothing needs any more: %s", self.id, key, error)

    def _persist(self, write: Callable[[Session], AnyResult]) -> AnyResult:
        def attempt() -> AnyResult:
            with self._sessions.begin() as session:
                return write(session)

        return self.patiently(attempt)

    def put_file(self, source: Path) -> StoredBlob:
        """Store a file, which is deleted by a cleaner unless it is made known while the job is held.

        Raises:
            OSError: as of `Blobs`; others of OUT_OF_REACH: the database is.
        """
        return self.blobs.put_file(source, self._noted_key())

    def put_file_patiently(self, source: Path) -> StoredBlob:
        """Store a file, however long the artifact store is away or refuses, unless the run is to stop meanwhile; else as `put_file`.

        Raises:
            StopAskedError: it is.
        """
        key = self.patiently(self._noted_key)
        return self.patiently(partial(self.blobs.put_file, source, key), hears_stop=True)

    def _noted_key(self) -> str:
        key = new_key()
        with self._sessions.begin() as session:
            note_unneeded(session=session, storage_keys=[key], lease_token=self._token)
        return key

    def patiently(self, attempt: Callable[[], AnyResult], *, hears_stop: bool = False) -> AnyResult:
        """What `attempt` returns, made again for as long as the store is out of reach and the lease is held.

        A store that refuses is waited for, too: somebody may mend its rights, and nothing that was trained is lost. The job's log says so.

        Args:
            attempt: Reads or writes something.
            hears_stop: Whether to give up as well when the run is to stop, by the error of `check_stop`. A database that is away needs no
                such look: without it the lease runs out soon.
        """
        pause, is_told = 0.2, False
        while True:
            if self.is_lost():
                raise LeaseLostError(self.id)
            try:
                return attempt()
            except OUT_OF_REACH as error:
                logger.warning("job %s: the store is out of reach (%s); trying again in %.1f s", self.id, type(error).__name__, pause)
                if isinstance(error, BlobsRefusedError) and not is_told:
                    is_told = True
                    self.tell(f"The artifact store refuses, and this job waits until that is mended: {error}\n")
                if hears_stop:
                    self.check_stop()
            time.sleep(pause)
            pause = min(2 * pause, MAX_RETRY_SECONDS)


def _check_hash(file: Path, stored: StoredBlob, written_sha256: str | None) -> None:
    """
    Args:
        file: An exported file, just stored.
        stored: The same.
        written_sha256: What its trainer said; None: a trainer of an older version didn't.
    """
    if written_sha256 not in (None, stored.sha256):
        raise DamagedExportError(file)
