"""Metrics, evaluations and artifacts in the store, on SQLite and PostgreSQL."""

from __future__ import annotations

from pathlib import Path

import pytest

from cliprd_core.run_dir import ErrorReason, ErrorRecord, EvaluationRecord, MetricsRecord
from service.store import artifacts, jobs, metrics
from service.store.blobs import BlobStore
from service.store.cursors import Page
from service.store.kinds import ArtifactKind
from service.store.models import Artifact
from service.store.session import reading
from tests.store_helpers import FAILURE, Sessions, claim, create, distilled_spec, evaluated, finish, measured, progress_at, read


@pytest.fixture
def claimed(sessions: Sessions) -> jobs.Claim:
    return claim(sessions, create(sessions).id)


def record(sessions: Sessions, claimed: jobs.Claim, *records: MetricsRecord) -> None:
    with sessions.begin() as session:
        jobs.record_metrics(session=session, job_id=claimed.job.id, lease_token=claimed.lease_token, records=records)


def series(sessions: Sessions, job_id: str, *names: str, since_step: int = 0, max_points: int = 1000) -> dict[str, metrics.Series]:
    with reading(sessions) as session:
        job = jobs.get_job(session=session, job_id=job_id)
        return metrics.series(session=session, job=job, names=names or ("*",), since_step=since_step, max_points=max_points)


def test_metrics_are_stored_and_their_latest_values_show_on_the_job(sessions: Sessions, claimed: jobs.Claim) -> None:
    record(sessions, claimed, measured(1, train_loss=3.0, train_lr=0.1), measured(2, train_loss=2.0))
    record(sessions, claimed, measured(4, train_loss=1.0))
    job = read(sessions, claimed.job.id)
    assert job.metrics == {"train/loss": 1.0, "train/lr": 0.1}
    assert job.progress == progress_at(4).model_dump(mode="json")
    assert series(sessions, job.id) == {
        "train/loss": metrics.Series([1, 2, 4], [3.0, 2.0, 1.0]),
        "train/lr": metrics.Series([1], [0.1]),
    }


def test_replayed_records_change_nothing_and_the_latest_attempt_wins(sessions: Sessions, claimed: jobs.Claim) -> None:
    first = [measured(step, train_loss=float(step)) for step in (1, 2, 3)]
    record(sessions, claimed, *first)
    record(sessions, claimed, *first)
    record(sessions, claimed, measured(2, attempt=2, train_loss=20.0))
    record(sessions, claimed, *first)
    record(sessions, claimed, measured(3, attempt=2, train_loss=30.0), measured(3, attempt=1, train_loss=3.0))
    assert series(sessions, claimed.job.id) == {"train/loss": metrics.Series([1, 2, 3], [1.0, 20.0, 30.0])}


def test_what_a_job_shows_never_goes_back_as_an_earlier_attempt_is_copied_again(sessions: Sessions, claimed: jobs.Claim) -> None:
    record(sessions, claimed, *(measured(step, train_loss=float(step)) for step in (1, 2, 4)))
    finish(sessions, claimed, ErrorRecord(reason=ErrorReason.WORKER_LOST, message="gone"))
    again = claim(sessions, claimed.job.id)
    assert again.attempt == 2
    record(sessions, again, measured(1, train_loss=1.0), measured(5, train_loss=5.0, train_late=7.0))
    job = read(sessions, again.job.id)
    assert job.progress == progress_at(4).model_dump(mode="json")
    assert job.metrics == {"train/loss": 4.0, "train/late": 7.0}
    assert series(sessions, job.id)["train/loss"].steps == [1, 2, 4, 5]
    record(sessions, again, measured(3, attempt=2, train_loss=30.0))
    job = read(sessions, again.job.id)
    assert job.progress == progress_at(3).model_dump(mode="json"), "it goes on from an older checkpoint"
    assert job.metrics == {"train/loss": 30.0, "train/late": 7.0}


def test_series_by_name_prefix_and_step(sessions: Sessions, claimed: jobs.Claim) -> None:
    record(sessions, claimed, *(measured(step, train_loss=1.0, train_fd=2.0, val_loss=3.0) for step in range(1, 6)))
    job_id = claimed.job.id
    assert list(series(sessions, job_id, "train/*")) == ["train/fd", "train/loss"]
    assert list(series(sessions, job_id, "val/loss", "train/fd")) == ["train/fd", "val/loss"]
    assert series(sessions, job_id, "train/los", "t_ain/*", "nothing") == {}
    assert series(sessions, job_id, "val/loss", since_step=4) == {"val/loss": metrics.Series([4, 5], [3.0, 3.0])}
    assert series(sessions, job_id, "val/loss", since_step=6) == {"val/loss": metrics.Series([], [])}


def test_long_series_are_thinned(sessions: Sessions, claimed: jobs.Claim) -> None:
    record(sessions, claimed, *(measured(step, train_loss=99.0 if step == 137 else 1.0) for step in range(500)))
    thinned = series(sessions, claimed.job.id, max_points=10)["train/loss"]
    assert len(thinned.steps) <= 10
    assert (thinned.steps[0], thinned.steps[-1]) == (0, 499)
    assert 137 in thinned.steps


def test_values_that_are_no_numbers_are_refused_and_nothing_is_written(sessions: Sessions, claimed: jobs.Claim) -> None:
    with pytest.raises(ValueError, match=r"train/loss.*step 2.*nan"):
        record(sessions, claimed, measured(1, train_loss=1.0), measured(2, train_loss=float("nan")))
    assert series(sessions, claimed.job.id) == {}


def test_evaluations(sessions: Sessions, claimed: jobs.Claim) -> None:
    def store(*records: EvaluationRecord) -> None:
        with sessions.begin() as session:
            jobs.record_evaluations(session=session, job_id=claimed.job.id, lease_token=claimed.lease_token, records=records)

    store(evaluated(20, attempt=2, top1=0.8), evaluated(10, top1=0.4), evaluated(20, attempt=1, top1=0.7))
    store(evaluated(20, attempt=1, top1=0.7))
    with reading(sessions) as session:
        first = metrics.list_evaluations(session=session, job_id=claimed.job.id, limit=1)
        rest = metrics.list_evaluations(session=session, job_id=claimed.job.id, limit=1, cursor=first.next_cursor)
    assert first.rows == [evaluated(10, top1=0.4)]
    assert rest == Page([evaluated(20, attempt=2, top1=0.8)], None)


@pytest.fixture
def blobs(tmp_path: Path) -> BlobStore:
    return BlobStore(tmp_path / "artifacts")


def register(
    sessions: Sessions, claimed: jobs.Claim, blobs: BlobStore, tmp_path: Path, name: str, *, group: str = "export", content: bytes = b"x"
) -> Artifact:
    source = tmp_path / "source"
    source.write_bytes(content)
    kind = ArtifactKind.MODEL if group == "export" else ArtifactKind.CHECKPOINT
    with sessions.begin() as session:
        (artifact,) = artifacts.register_artifacts(
            session=session,
            job_id=claimed.job.id,
            lease_token=claimed.lease_token,
            kind=kind,
            group=group,
            files={name: blobs.put_file(source)},
        )
    return artifact


def test_artifacts_are_registered_listed_and_replaced(sessions: Sessions, claimed: jobs.Claim, blobs: BlobStore, tmp_path: Path) -> None:
    names = [register(sessions, claimed, blobs, tmp_path, f"{number}.bin").name for number in range(3)]
    first = register(sessions, claimed, blobs, tmp_path, "0.bin", content=b"second attempt")
    register(sessions, claimed, blobs, tmp_path, "0.bin", group="step-0000000100")
    with reading(sessions) as session:
        page = artifacts.list_artifacts(session=session, job_id=claimed.job.id, kind=ArtifactKind.MODEL, limit=2)
        rest = artifacts.list_artifacts(session=session, kind=ArtifactKind.MODEL, limit=2, cursor=page.next_cursor)
        assert [one.name for one in [*page.rows, *rest.rows]] == names[::-1]
        assert rest.next_cursor is None
        found = artifacts.get_artifact(session=session, artifact_id=first.id)
        assert blobs.path(found.storage_key).read_bytes() == b"second attempt"
        with pytest.raises(jobs.ArtifactNotFoundError):
            artifacts.get_artifact(session=session, artifact_id="00000000-none")


def test_replaced_checkpoints_are_forgotten(sessions: Sessions, claimed: jobs.Claim, blobs: BlobStore, tmp_path: Path) -> None:
    kept = register(sessions, claimed, blobs, tmp_path, "state.pt", group="step-0000000200")
    model = register(sessions, claimed, blobs, tmp_path, "model.safetensors")
    gone = register(sessions, claimed, blobs, tmp_path, "state.pt", group="step-0000000100")
    with sessions.begin() as session:
        keys = artifacts.remove_artifacts(
            session=session,
            job_id=claimed.job.id,
            lease_token=claimed.lease_token,
            kind=ArtifactKind.CHECKPOINT,
            keep_groups=["step-0000000200"],
        )
    assert keys == [gone.storage_key]
    with reading(sessions) as session:
        assert {one.id for one in artifacts.list_artifacts(session=session).rows} == {kept.id, model.id}


def test_an_old_failed_jobs_checkpoints_go_but_not_under_the_feet_of_a_retry(
    sessions: Sessions, claimed: jobs.Claim, blobs: BlobStore, tmp_path: Path
) -> None:
    kept = register(sessions, claimed, blobs, tmp_path, "state.pt", group="step-0000000100")
    finish(sessions, claimed, FAILURE)

    def removed(older_than_seconds: float = 0) -> list[str]:
        with sessions.begin() as session:
            return artifacts.remove_finished_checkpoints(session=session, older_than_seconds=older_than_seconds)

    assert removed(older_than_seconds=60) == []
    with sessions.begin() as session:
        jobs.retry_job(session=session, job_id=claimed.job.id)
        if session.get_bind().dialect.name == "postgresql":  # where others can write at the same time
            assert removed() == []
    assert removed() == []
    finish(sessions, claim(sessions, claimed.job.id), FAILURE)
    assert removed() == [kept.storage_key]
    assert removed() == []


def test_artifacts_need_the_lease_too(sessions: Sessions, claimed: jobs.Claim, blobs: BlobStore, tmp_path: Path) -> None:
    finish(sessions, claimed)
    with pytest.raises(jobs.LeaseLostError):
        register(sessions, claimed, blobs, tmp_path, "late.bin")


def test_a_checkpoint_is_no_teacher_but_a_model_is(sessions: Sessions, claimed: jobs.Claim, blobs: BlobStore, tmp_path: Path) -> None:
    model = register(sessions, claimed, blobs, tmp_path, "model.safetensors")
    checkpoint = register(sessions, claimed, blobs, tmp_path, "state.pt", group="step-0000000100")
    spec = distilled_spec(claimed.job.id)

    def with_artifact(artifact_id: str) -> jobs.JobState:
        assert spec.teacher is not None
        teacher = spec.teacher.model_copy(update={"job": None, "artifact": artifact_id})
        return create(sessions, spec.model_copy(update={"teacher": teacher})).state

    assert with_artifact(model.id) is jobs.JobState.WAITING, "the job that made it may yet fail, or be deleted"
    with pytest.raises(jobs.TeacherUnavailableError, match="is a checkpoint, not a model"):
        with_artifact(checkpoint.id)
    finish(sessions, claimed)
    assert with_artifact(model.id) is jobs.JobState.QUEUED
