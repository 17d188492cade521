"""The mirror of checkpoints: what it says is in the store is there and whole, whatever the store does meanwhile."""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session

from cliprd_core.checkpoint import prune_checkpoints
from cliprd_core.retention import BestCheckpoint, CheckpointsToKeep
from cliprd_core.run_dir import BEST_FILE, CHECKPOINT_MARKER, CHECKPOINTS_DIR, checkpoint_dir, complete_checkpoints, step_of
from service.store.blobs import BlobsUnreachableError, StoredBlob
from service.store.jobs import JobState, LeaseLostError, QueuedJob
from service.store.kinds import ArtifactKind
from tests.fake_trainer import save
from tests.worker_bench import Bench, soon
from worker.cleaner import Cleaner
from worker.mirror import CheckpointMirror


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    bench = Bench(tmp_path)
    yield bench
    bench.engine.dispose()


def mirrored_steps(bench: Bench, job_id: str, kind: ArtifactKind = ArtifactKind.CHECKPOINT) -> set[int | None]:
    """Steps that the store knows; all of their bytes are there."""
    artifacts = bench.artifacts(job_id, kind)
    assert all(bench.blobs.path(one.storage_key).is_file() for one in artifacts), "rows without bytes"
    return {one.step for one in artifacts}


def test_old_bytes_that_cannot_be_deleted_cost_no_new_ones(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    job_id = bench.submit({})
    mirror = CheckpointMirror(bench.held(job_id), bench.run_dir(job_id), num_kept=1)
    save(bench.run_dir(job_id), 5)
    mirror.mirror()
    save(bench.run_dir(job_id), 10)
    delete, failures = bench.blobs.delete, [BlobsUnreachableError("503 Slow Down")]

    def delete_or_fail(key: str) -> None:
        if failures:
            raise failures.pop()
        delete(key)

    monkeypatch.setattr(bench.blobs, "delete", delete_or_fail)
    mirror.mirror()
    assert not failures
    assert mirrored_steps(bench, job_id) == {10}
    assert "which nothing needs any more" in caplog.text


def test_a_commit_whose_acknowledgement_is_lost_keeps_the_checkpoint(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    job_id = bench.submit({})
    job = bench.held(job_id)
    mirror = CheckpointMirror(job, bench.run_dir(job_id), num_kept=1)
    save(bench.run_dir(job_id), 5)
    begin, add = bench.sessions.begin, job.add_checkpoint

    @contextmanager
    def begin_and_lose_answer_and_lease() -> Iterator[Session]:
        monkeypatch.setattr(bench.sessions, "begin", begin)
        with begin() as session:
            yield session
        job.is_lost = lambda: True
        raise OperationalError("COMMIT", {}, ConnectionError("the answer was lost"))

    def add_in_vain(*arguments: Any) -> None:
        monkeypatch.setattr(bench.sessions, "begin", begin_and_lose_answer_and_lease)
        add(*arguments)

    monkeypatch.setattr(job, "add_checkpoint", add_in_vain)
    with pytest.raises(LeaseLostError):
        mirror.mirror()
    assert mirrored_steps(bench, job_id) == {5}


def test_an_artifact_store_that_is_away_at_the_end_delays_the_success(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    job_id = bench.submit({"steps": "20", "best": "20"})
    put_file, away_until = bench.blobs.put_file, [float("inf")]

    def put_or_fail(path: Path, key: str) -> StoredBlob:
        if (bench.run_dir(job_id) / "result.json").exists():
            away_until[0] = min(away_until[0], time.monotonic() + 0.5)
        if "step-0000000020" in path.parent.name and time.monotonic() < away_until[0]:
            raise BlobsUnreachableError("503 Slow Down")
        return put_file(path, key)

    monkeypatch.setattr(bench.blobs, "put_file", put_or_fail)
    bench.run(job_id)
    assert bench.job(job_id).state is JobState.SUCCEEDED
    assert mirrored_steps(bench, job_id, ArtifactKind.BEST_CHECKPOINT) == {20}


def test_a_worker_that_gets_the_job_back_does_not_replace_a_better_checkpoint(bench: Bench, tmp_path: Path) -> None:
    job_id = bench.submit({"steps": "30", "best": "5", "error": "diverged"})
    here = bench.settings
    bench.run(job_id)
    assert mirrored_steps(bench, job_id, ArtifactKind.BEST_CHECKPOINT) == {5}
    bench.retry(job_id, {"steps": "60", "best": "20", "error": "timeout"})
    bench.settings = here.model_copy(update={"runs_root": tmp_path / "another machine"})
    bench.run(job_id)
    assert mirrored_steps(bench, job_id, ArtifactKind.BEST_CHECKPOINT) == {20}
    bench.retry(job_id, {"steps": "60", "step_seconds": "0.05"})
    bench.settings = here
    bench.run(job_id)
    assert bench.job(job_id).state is JobState.SUCCEEDED
    assert mirrored_steps(bench, job_id, ArtifactKind.BEST_CHECKPOINT) == {20}


def test_a_damaged_checkpoint_is_not_mirrored_but_the_one_before(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    job_id = bench.submit({})
    run = bench.run_dir(job_id)
    mirror = CheckpointMirror(bench.held(job_id), run, num_kept=2)
    for step in (5, 10, 15, 20):
        save(run, step)
    (checkpoint_dir(run, 20) / "state.json").unlink()
    (checkpoint_dir(run, 15) / "state.json").write_text('{"step": 16}')
    (checkpoint_dir(run, 10) / CHECKPOINT_MARKER).write_text("{")
    mirror.mirror()
    assert mirrored_steps(bench, job_id) == {5}
    assert complete_checkpoints(run) == [checkpoint_dir(run, 5)]
    assert len([path for path in bench.blobs.root.rglob("*") if path.is_file()]) == 2, "bytes that nothing names"
    assert "step-0000000020 is damaged (state.json missing)" in caplog.text
    assert "step-0000000015 is damaged (state.json does not match its hash)" in caplog.text
    assert "step-0000000010 is damaged (COMPLETE.json is not readable)" in caplog.text


def test_a_damaged_best_checkpoint_leaves_the_one_that_is_stored(bench: Bench) -> None:
    job_id = bench.submit({})
    run = bench.run_dir(job_id)
    mirror = CheckpointMirror(bench.held(job_id), run, num_kept=2)
    for step in (5, 10):
        save(run, step)
        (run / BEST_FILE).write_text(BestCheckpoint(step=step, value=step / 100).model_dump_json())
        if step == 10:
            (checkpoint_dir(run, step) / "state.json").write_text('{"step": 11}')
        mirror.mirror_best()
    assert mirrored_steps(bench, job_id, ArtifactKind.BEST_CHECKPOINT) == {5}
    (run / BEST_FILE).write_text("{")
    mirror.mirror_best()
    assert not (run / BEST_FILE).exists()


def test_an_unreadable_marker_does_not_keep_a_job_from_being_given_back(bench: Bench) -> None:
    job_id = bench.submit({"steps": "1000", "step_seconds": "0.02"})
    run = bench.run_dir(job_id)

    def damage_and_stop() -> None:
        checkpoint_dir(run, 9000).mkdir()
        (checkpoint_dir(run, 9000) / CHECKPOINT_MARKER).write_text("{")
        bench.stop.set()

    soon(lambda: bool(complete_checkpoints(run)), damage_and_stop)
    assert bench.run(job_id) == [QueuedJob(job_id, "default")]
    assert bench.job(job_id).state is JobState.QUEUED
    newest = complete_checkpoints(run)[-1]
    assert step_of(newest) < 1000
    assert step_of(newest) in mirrored_steps(bench, job_id)


def no_links(*_: object) -> None:
    raise PermissionError(1, "Operation not permitted")


@pytest.mark.parametrize("has_links", [True, False])
def test_a_checkpoint_that_the_trainer_prunes_while_it_is_uploaded_is_mirrored(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, has_links: bool
) -> None:
    job_id = bench.submit({})
    run = bench.run_dir(job_id)
    mirror = CheckpointMirror(bench.held(job_id), run, num_kept=1)
    save(run, 5)
    put_file = bench.blobs.put_file

    def put_slowly(source: Path, key: str) -> StoredBlob:
        save(run, 10)
        prune_checkpoints(run, CheckpointsToKeep(newest=1), None)
        return put_file(source, key)

    monkeypatch.setattr(bench.blobs, "put_file", put_slowly)
    if not has_links:
        monkeypatch.setattr("os.link", no_links)
    mirror.mirror()
    assert mirrored_steps(bench, job_id) == {5}
    assert [one.name for one in (run / CHECKPOINTS_DIR).iterdir()] == ["step-0000000010"], "the links are gone"


@pytest.mark.parametrize("name", ["marker", "file"])
def test_a_checkpoint_that_goes_as_its_upload_begins_gives_way_to_the_newest(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    job_id = bench.submit({})
    run = bench.run_dir(job_id)
    mirror = CheckpointMirror(bench.held(job_id), run, num_kept=1)
    save(run, 5)
    link = os.link

    def link_and_prune(source: Path, target: Path) -> None:
        if "step-0000000005" in str(source) and (source.name == CHECKPOINT_MARKER) == (name == "marker"):
            save(run, 10)
            prune_checkpoints(run, CheckpointsToKeep(newest=1), None)
        link(source, target)

    monkeypatch.setattr("os.link", link_and_prune)
    mirror.start()
    mirror.wait()
    assert mirrored_steps(bench, job_id) == {10}
    assert [one.name for one in (run / CHECKPOINTS_DIR).iterdir()] == ["step-0000000010"]
    assert not [one for one in caplog.records if one.levelname != "DEBUG"], "it is no fault, neither of the store nor of the checkpoint"


def test_a_checkpoint_that_is_seen_and_not_there_delays_the_mirror(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Not retried without a pause; and the job's end does not wait for it for ever."""
    job_id = bench.submit({})
    run = bench.run_dir(job_id)
    mirror = CheckpointMirror(bench.held(job_id), run, num_kept=1)
    save(run, 5)

    def link_in_vain(*_: Path) -> None:
        raise FileNotFoundError

    monkeypatch.setattr("os.link", link_in_vain)
    mirror.start()
    mirror.wait()
    assert "a checkpoint was not mirrored" in caplog.text
    with pytest.raises(FileNotFoundError, match="can't be read"):
        mirror.mirror()


def test_links_of_a_killed_worker_are_swept(bench: Bench) -> None:
    job_id = bench.submit({"steps": "20", "error": "timeout"})
    run = bench.run_dir(job_id)
    left = run / CHECKPOINTS_DIR / ".mirroring-step-0000000005-00000000"
    left.mkdir(parents=True)
    (left / "state.json").write_text("{}")
    bench.run(job_id)
    assert complete_checkpoints(run)
    assert not left.exists()


def test_what_a_killed_worker_uploaded_is_deleted_when_its_lease_has_run_out(bench: Bench) -> None:
    job_id = bench.submit({})
    job = bench.held(job_id)
    save(bench.run_dir(job_id), 5)
    mirror = CheckpointMirror(job, bench.run_dir(job_id), num_kept=1)
    mirror.mirror()
    orphan = job.put_file(bench.run_dir(job_id) / "checkpoints" / "step-0000000005" / "state.json")
    bench.blobs.path(orphan.key).with_suffix(".tmp").write_bytes(b"half of anoth")
    cleaner = Cleaner(bench.settings)
    cleaner.run_once()
    assert bench.blobs.path(orphan.key).exists(), "it may be made known yet"
    bench.take_away(job_id)
    cleaner.run_once()
    assert mirrored_steps(bench, job_id) == {5}
    assert len([path for path in bench.blobs.root.rglob("*") if path.is_file()]) == 2, "those of the checkpoint"


def test_a_database_that_is_away_delays_the_mirror_only(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    job_id = bench.submit({"steps": "60", "step_seconds": "0.02"})
    job, failures = bench.held(job_id), [1, 2]
    note = job._noted_key

    def note_or_fail() -> str:
        if failures:
            raise OperationalError("INSERT", {}, ConnectionError("store away" * failures.pop()))
        return note()

    monkeypatch.setattr("worker.mirror.RETRY_SECONDS", 0.1)
    monkeypatch.setattr(job, "_noted_key", note_or_fail)
    bench.supervisor(job).run()
    assert not failures
    assert bench.job(job_id).state is JobState.SUCCEEDED
