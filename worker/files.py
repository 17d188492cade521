"""Copies artifacts from the store into a run directory, verified: an earlier job's model as the teacher, and mirrored checkpoints."""

from __future__ import annotations

import errno
import hashlib
import logging
import shutil
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from cliprd_core.checkpoint_files import find_fault, latest_whole
from cliprd_core.run_dir import CHECKPOINTS_DIR, checkpoint_dir, sync_directory
from cliprd_core.spec import JobSpec, TeacherSpec
from service.store.artifacts import get_artifact
from service.store.jobs import ArtifactNotFoundError
from service.store.kinds import ArtifactKind
from service.store.models import Artifact
from worker.held_job import EXPORT_GROUP, HeldJob

logger = logging.getLogger(__name__)

TEACHERS_DIR = "teachers"


class TeacherGoneError(Exception):
    """The artifacts that should be the teacher are not in the store, or not whole."""


class LostBytesError(Exception):
    """The artifact store no longer holds what was stored there. Fetching it again would not help, unlike after a failure of the store."""


def with_fetched_teachers(job: HeldJob, run: Path) -> JobSpec:
    """The job's spec as the trainer can run it: teachers from this service are copied into the run directory.

    Raises:
        TeacherGoneError: one cannot be had; the message is for the user.
        OSError: it cannot be written here, as on a full disk.
    """
    fetched = {field: _fetch_teacher(job, teacher, run / TEACHERS_DIR / field) for field, teacher in job.spec.teacher_fields.items()}
    return job.spec.with_teachers(fetched)


def _fetch_teacher(job: HeldJob, teacher: TeacherSpec, folder: Path) -> TeacherSpec:
    if teacher.job is None and teacher.artifact is None:
        return teacher
    files = _teacher_files(job, teacher)
    if not files:
        raise TeacherGoneError(f"Job {teacher.job} has no exported model. Submit this job again with a teacher that has one.")
    try:
        fetch_files(job, files, folder)
    except LostBytesError as error:
        raise TeacherGoneError(f"The teacher's files could not be fetched from the artifact store: {error}") from error
    return TeacherSpec(model=f"local-dir:{folder}")


def _teacher_files(job: HeldJob, teacher: TeacherSpec) -> list[Artifact]:
    """A model is several files, so a single artifact stands for all of its job's export."""
    if teacher.job is not None:
        return job.artifacts(teacher.job, ArtifactKind.MODEL, EXPORT_GROUP)
    artifact_id = teacher.artifact
    assert artifact_id is not None
    try:
        named = job.read(lambda session: get_artifact(session=session, artifact_id=artifact_id))
    except ArtifactNotFoundError as error:
        raise TeacherGoneError(f"Artifact {artifact_id} is gone. Submit this job again with another teacher.") from error
    return job.artifacts(named.job_id, ArtifactKind.MODEL, named.group)


def restore_checkpoint(job: HeldJob, run: Path) -> int | None:
    """Bring the newest mirrored checkpoint into the run directory where that has none as new that is whole.

    Returns:
        The step restored, or None if nothing was to be done. A damaged mirror is passed over for the next older one.

    Raises:
        OSError: it cannot be written here, as on a full disk: no reason to train those steps again.
    """
    by_step: dict[int, list[Artifact]] = {}
    for artifact in job.artifacts(job.id, ArtifactKind.CHECKPOINT):
        assert artifact.step is not None, "checkpoints carry their step"
        by_step.setdefault(artifact.step, []).append(artifact)
    local = latest_whole(run) if by_step else None
    for step in sorted(by_step, reverse=True):
        target = checkpoint_dir(run, step)
        if local is not None and local.name >= target.name:
            return None
        scratch = run / CHECKPOINTS_DIR / f".restoring-{target.name}"
        try:
            _fetch_checkpoint(job, by_step[step], scratch)
        except LostBytesError as error:
            logger.warning("job %s: the mirrored checkpoint of step %d cannot be used: %s", job.id, step, error)
            continue
        shutil.rmtree(target, ignore_errors=True)  # an incomplete or damaged one
        scratch.replace(target)
        sync_directory(target.parent)
        return step
    return None


def _fetch_checkpoint(job: HeldJob, files: Sequence[Artifact], folder: Path) -> None:
    """As `fetch_files`; a checkpoint that was damaged already when it was stored is lost too."""
    fetch_files(job, files, folder)
    fault = find_fault(folder)
    if fault is not None:
        shutil.rmtree(folder)
        raise LostBytesError(fault)


def fetch_files(job: HeldJob, files: Sequence[Artifact], folder: Path) -> None:
    """Make `folder` hold exactly these artifacts, however long the store is away; after an error there is no such folder.

    Raises:
        LostBytesError: one is missing in the store, or its bytes are not those that were stored.
        LeaseLostError: the job is another worker's now.
        StopAskedError: the run is to stop.
        OSError: any other failure, such as a full disk.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        for artifact in files:
            job.patiently(partial(_fetch, job, artifact, folder / artifact.name), hears_stop=True)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _fetch(job: HeldJob, artifact: Artifact, target: Path) -> None:
    digest = hashlib.sha256()
    with target.open("wb") as file:
        for chunk in _stored_bytes(job, artifact):
            job.check_stop()
            digest.update(chunk)
            file.write(chunk)
    if digest.hexdigest() != artifact.sha256:
        raise LostBytesError(f"artifact {artifact.id} ({artifact.name}) is damaged: its SHA-256 is not the one recorded")


def _stored_bytes(job: HeldJob, artifact: Artifact) -> Iterator[bytes]:
    """An artifact's bytes. Errors in here are the store's, never those of the disk that the bytes are written to."""
    try:
        yield from job.blobs.stream(artifact.storage_key)
    except OSError as error:
        if isinstance(error, FileNotFoundError) or error.errno == errno.EIO:
            raise LostBytesError(f"artifact {artifact.id} ({artifact.name}) cannot be read: {error}") from error
        raise
