"""Copies artifacts from the store into a run directory, verified: an earlier job's model as the teacher, and mirrored checkpoints."""

from __future__ import annotations

import hashlib
import logging
import shutil
from collections.abc import Sequence
from pathlib import Path

from cliprd_core.run_dir import CHECKPOINTS_DIR, checkpoint_dir, complete_checkpoints, sync_directory
from cliprd_core.spec import JobSpec, TeacherSpec
from service.store.artifacts import get_artifact
from service.store.blobs import Blobs
from service.store.jobs import ArtifactNotFoundError
from service.store.models import Artifact, ArtifactKind
from worker.held_job import EXPORT_GROUP, HeldJob

logger = logging.getLogger(__name__)

TEACHERS_DIR = "teachers"


class TeacherGoneError(Exception):
    """The artifacts that should be the teacher are not in the store, or not whole."""


def with_fetched_teachers(job: HeldJob, run: Path) -> JobSpec:
    """The job's spec as the trainer can run it: teachers from this service are copied into the run directory.

    Raises:
        TeacherGoneError: one cannot be had; the message is for the user.
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
        fetch_files(job.blobs, files, folder)
    except OSError as error:
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
    """Bring the newest mirrored checkpoint into the run directory where that has none as new.

    Returns:
        The step restored, or None if nothing was to be done. A damaged mirror is passed over for the next older one.
    """
    by_step: dict[int, list[Artifact]] = {}
    for artifact in job.artifacts(job.id, ArtifactKind.CHECKPOINT):
        assert artifact.step is not None, "checkpoints carry their step"
        by_step.setdefault(artifact.step, []).append(artifact)
    local = complete_checkpoints(run)
    for step in sorted(by_step, reverse=True):
        target = checkpoint_dir(run, step)
        if local and local[-1].name >= target.name:
            return None
        scratch = run / CHECKPOINTS_DIR / f".restoring-{target.name}"
        try:
            fetch_files(job.blobs, by_step[step], scratch)
            shutil.rmtree(target, ignore_errors=True)  # an incomplete one
            scratch.replace(target)
            sync_directory(target.parent)
        except OSError as error:
            logger.warning("job %s: the mirrored checkpoint of step %d cannot be used: %s", job.id, step, error)
            shutil.rmtree(scratch, ignore_errors=True)
            continue
        return step
    return None


def fetch_files(blobs: Blobs, files: Sequence[Artifact], folder: Path) -> None:
    """Make `folder` hold exactly these artifacts.

    Raises:
        OSError: one is missing in the store, or its bytes are not those that were stored.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for artifact in files:
        digest = hashlib.sha256()
        with (folder / artifact.name).open("xb") as target:
            for chunk in blobs.stream(artifact.storage_key):
                digest.update(chunk)
                target.write(chunk)
        if digest.hexdigest() != artifact.sha256:
            raise OSError(f"artifact {artifact.id} ({artifact.name}) is damaged: its SHA-256 is not the one recorded")
