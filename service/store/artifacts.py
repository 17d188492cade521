"""The files that jobs made: what is known of each. Their bytes are in `service.store.blobs`."""

from __future__ import annotations

import uuid
from collections.abc import Collection, Mapping
from datetime import timedelta

from sqlalchemy import ColumnElement, delete, exists, select
from sqlalchemy.orm import Session

from service.store.blobs import StoredBlob
from service.store.cursors import Page, newest_page
from service.store.errors import ArtifactNotFoundError
from service.store.kinds import ArtifactKind
from service.store.leases import lock_held_job
from service.store.models import Artifact, Job
from service.store.session import database_now
from service.store.states import JobState
from service.store.unneeded_blobs import forget_unneeded, note_unneeded

__all__ = [
    "Artifact",
    "ArtifactKind",
    "get_artifact",
    "list_artifacts",
    "register_artifacts",
    "remove_artifacts",
    "remove_finished_checkpoints",
]

MAX_CLEANED = 1000
"""Jobs whose checkpoints are forgotten at once; the next round takes the next ones."""


def register_artifacts(
    *,
    session: Session,
    job_id: str,
    lease_token: str,
    kind: ArtifactKind,
    group: str,
    files: Mapping[str, StoredBlob],
    step: int | None = None,
) -> list[Artifact]:
    """Make stored files known, by their names. One of the same job, kind, group and name as an earlier one takes its place and id.

    The bytes that are replaced are deleted by a cleaner, if not before.

    All in a few statements: each is a chance for a bad network to undo the whole transaction, a job's end.

    Raises:
        LeaseLostError: the token no longer holds the job.
    """
    lock_held_job(session=session, job_id=job_id, lease_token=lease_token)
    same = select(Artifact).where(Artifact.job_id == job_id, Artifact.kind == kind, Artifact.group == group, Artifact.name.in_(files))
    known = {artifact.name: artifact for artifact in session.scalars(same)}
    replaced = [artifact.storage_key for name, artifact in known.items() if artifact.storage_key != files[name].key]
    note_unneeded(session=session, storage_keys=replaced)
    now = database_now(session)
    for place, (name, blob) in enumerate(files.items()):
        artifact = known.get(name)
        if artifact is None:
            created_at = now + timedelta(microseconds=place)  # lists keep the files' order
            artifact = Artifact(id=str(uuid.uuid4()), job_id=job_id, kind=kind, group=group, name=name, created_at=created_at)
            known[name] = artifact
        artifact.step = step
        artifact.num_bytes = blob.num_bytes
        artifact.sha256 = blob.sha256
        artifact.media_type = "application/json" if name.endswith(".json") else "application/octet-stream"
        artifact.storage_key = blob.key
    session.add_all(known.values())
    forget_unneeded(session=session, storage_keys=[blob.key for blob in files.values()])
    session.flush()
    return [known[name] for name in files]


def get_artifact(*, session: Session, artifact_id: str) -> Artifact:
    """The artifact of this id.

    Raises:
        ArtifactNotFoundError: there is none.
    """
    artifact = session.get(Artifact, artifact_id)
    if artifact is None:
        raise ArtifactNotFoundError(artifact_id)
    return artifact


def list_artifacts(
    *,
    session: Session,
    job_id: str | None = None,
    kind: ArtifactKind | None = None,
    group: str | None = None,
    limit: int = 50,
    cursor: str | None = None,
) -> Page[Artifact]:
    """Artifacts, newest first, of one job, kind and group, or of all.

    Raises:
        InvalidCursorError: the cursor is no earlier page's `next_cursor`.
    """
    query = select(Artifact)
    for column, value in ((Artifact.job_id, job_id), (Artifact.kind, kind), (Artifact.group, group)):
        if value is not None:
            query = query.where(column == value)
    return newest_page(session, query, Artifact.created_at, Artifact.id, limit=limit, cursor=cursor)


def are_registered(*, session: Session, storage_keys: Collection[str]) -> bool:
    """Whether any artifact has its bytes under one of these keys."""
    return session.scalar(select(Artifact.id).where(Artifact.storage_key.in_(storage_keys)).limit(1)) is not None


def remove_finished_checkpoints(*, session: Session, older_than_seconds: float) -> list[str]:
    """Forget all checkpoints of jobs that finished this long ago, whichever way; of MAX_CLEANED jobs at most.

    Returns:
        The storage keys that nothing names any more; a cleaner deletes the bytes after the commit, if nobody does before.
    """
    cutoff = database_now(session) - timedelta(seconds=older_than_seconds)
    is_finished = (Job.state.in_([state for state in JobState if state.is_finished]), Job.finished_at <= cutoff)
    has_checkpoints = exists().where(Artifact.job_id == Job.id, Artifact.kind == ArtifactKind.CHECKPOINT)
    # Locked, so that whoever retries one of them meanwhile either keeps its checkpoints or finds none.
    found = session.scalars(select(Job.id).where(*is_finished, has_checkpoints).limit(MAX_CLEANED).with_for_update(skip_locked=True)).all()
    return _removed(session, Artifact.kind == ArtifactKind.CHECKPOINT, Artifact.job_id.in_(found)) if found else []


def remove_artifacts(*, session: Session, job_id: str, lease_token: str, kind: ArtifactKind, keep_groups: Collection[str]) -> list[str]:
    """Forget the job's artifacts of this kind outside `keep_groups`, as for checkpoints that newer ones replaced.

    Returns:
        The storage keys that nothing names any more; a cleaner deletes the bytes after the commit, if nobody does before.

    Raises:
        LeaseLostError: the token no longer holds the job.
    """
    lock_held_job(session=session, job_id=job_id, lease_token=lease_token)
    outside = (Artifact.job_id == job_id, Artifact.kind == kind, Artifact.group.not_in(keep_groups))
    return _removed(session, *outside)


def _removed(session: Session, *are_unneeded: ColumnElement[bool]) -> list[str]:
    keys = list(session.scalars(delete(Artifact).where(*are_unneeded).returning(Artifact.storage_key)))
    note_unneeded(session=session, storage_keys=keys)
    return keys
