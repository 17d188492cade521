"""An artifact store that refuses, or is away, as a run ends: waited for, with the job's log saying so, but not against a user's will."""

import errno
from collections.abc import Callable, Iterator
from io import BufferedRandom
from pathlib import Path

import pytest

from cliprd_core.run_dir import ErrorReason, complete_checkpoints, step_of
from service.store.blobs import BlobsRefusedError, BlobStore, BlobsUnreachableError, StoredBlob
from service.store.jobs import JobState, QueuedJob, request_cancel, request_pause
from service.store.kinds import ArtifactKind
from service.store.logs import read_log
from service.store.session import reading
from tests.worker_bench import Bench, soon

REFUSAL = BlobsRefusedError("s3://models: (AccessDenied) no. Allow the worker's identity to write there.")


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    bench = Bench(tmp_path)
    yield bench
    bench.engine.dispose()


class Failing:
    """Storing files that fails, for as long as `error` says with what."""

    def __init__(self, bench: Bench, error: OSError) -> None:
        self._put_file = bench.blobs.put_file
        self.error: OSError | None = error
        self.num_failures = 0

    def __call__(self, source: Path, key: str) -> StoredBlob:
        if self.error is not None:
            self.num_failures += 1
            raise self.error
        return self._put_file(source, key)


@pytest.fixture
def failing(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> Failing:
    failing = Failing(bench, REFUSAL)
    monkeypatch.setattr(bench.blobs, "put_file", failing)
    return failing


def stored_log(bench: Bench, job_id: str) -> str:
    with reading(bench.sessions) as session:
        return read_log(session=session, job_id=job_id)[0]


def waits(bench: Bench, job_id: str) -> bool:
    return "The artifact store refuses" in stored_log(bench, job_id)


def test_a_store_that_refuses_is_waited_for_until_that_is_mended(bench: Bench, failing: Failing) -> None:
    job_id = bench.submit({"steps": "12"})
    soon(lambda: waits(bench, job_id), lambda: setattr(failing, "error", None))
    bench.run(job_id)
    assert bench.job(job_id).state is JobState.SUCCEEDED
    assert len(bench.artifacts(job_id, ArtifactKind.MODEL)) == 2
    assert f"this job waits until that is mended: {REFUSAL}\n" in stored_log(bench, job_id)


def test_a_folder_without_rights_is_waited_for_as_well(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = bench.settings.artifacts_root

    def denied(_: BlobStore, path: Path) -> BufferedRandom:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    with monkeypatch.context() as without_rights:
        without_rights.setattr(BlobStore, "_new_file", denied)
        job_id = bench.submit({"steps": "12"})
        soon(lambda: waits(bench, job_id), without_rights.undo)
        bench.run(job_id)
    assert bench.job(job_id).state is JobState.SUCCEEDED
    assert f"right to read and write the artifact folder {folder} and all that is in it." in stored_log(bench, job_id)


def ask(bench: Bench, request: Callable[..., object], job_id: str) -> None:
    with bench.sessions.begin() as session:
        request(session=session, job_id=job_id)


def test_cancelling_ends_the_wait(bench: Bench, failing: Failing) -> None:
    job_id = bench.submit({"steps": "12"})
    soon(lambda: waits(bench, job_id), lambda: ask(bench, request_cancel, job_id))
    bench.run(job_id)
    assert bench.job(job_id).state is JobState.CANCELLED


@pytest.mark.parametrize("error", [REFUSAL, BlobsUnreachableError("503 Slow Down")])
def test_shutdown_ends_the_wait_and_the_next_attempt_trains_nothing_again(bench: Bench, failing: Failing, error: OSError) -> None:
    job_id = bench.submit({"steps": "10"})
    failing.error = error
    bench.settings = bench.settings.model_copy(update={"grace_seconds": 0.5})
    soon(lambda: (bench.run_dir(job_id) / "result.json").exists() and failing.num_failures > 3, bench.stop.set)
    assert bench.run(job_id) == [QueuedJob(job_id, "default")]
    assert bench.job(job_id).num_releases == 1
    bench.stop.clear()
    failing.error = None
    bench.run(job_id)
    assert bench.job(job_id).state is JobState.SUCCEEDED
    assert "attempt 2 starts at step 10\n" in bench.log(job_id)


def test_a_pause_ends_the_wait(bench: Bench, failing: Failing) -> None:
    job_id = bench.submit({"steps": "12"})
    soon(lambda: waits(bench, job_id), lambda: ask(bench, request_pause, job_id))
    assert bench.run(job_id) == []
    assert bench.job(job_id).state is JobState.PAUSED


def test_the_end_of_a_jobs_time_ends_the_wait_and_is_told(bench: Bench, failing: Failing) -> None:
    job_id = bench.submit({"steps": "12"}, resources={"max_hours": 1.0})
    supervisor = bench.supervisor(bench.held(job_id))
    soon(lambda: waits(bench, job_id), lambda: setattr(supervisor, "_stop_at", 0.0))
    supervisor.run()
    error = bench.error(job_id)
    assert error.reason is ErrorReason.TIMEOUT
    assert f"in the end for the artifact store ({REFUSAL}), and was stopped" in error.message
    assert stored_log(bench, job_id).splitlines()[-2] == f"Attempt 1 failed: timeout: {error.message}"


def test_a_time_that_ends_with_the_training_leaves_some_for_the_upload(bench: Bench, failing: Failing) -> None:
    job_id = bench.submit({"steps": "12", "deaf": "yes", "holds_at": "10"}, resources={"max_hours": 1.0})
    supervisor = bench.supervisor(bench.held(job_id))
    failing.error = BlobsUnreachableError("503 Slow Down")

    def end_time() -> None:
        supervisor._stop_at = 0.0
        bench.go_on(job_id, 10)  # and, being deaf, to its end

    def end_outage() -> None:
        failing.num_failures = 0
        soon(lambda: failing.num_failures > 1, lambda: setattr(failing, "error", None))

    soon(lambda: bool(complete_checkpoints(bench.run_dir(job_id))), end_time)
    soon((bench.run_dir(job_id) / "result.json").exists, end_outage)
    supervisor.run()
    assert bench.job(job_id).state is JobState.SUCCEEDED


def test_the_last_checkpoint_is_tried_again_within_the_grace_period(bench: Bench, failing: Failing) -> None:
    job_id = bench.submit({"steps": "1000", "step_seconds": "0.02"})
    failing.error = BlobsUnreachableError("503 Slow Down")
    soon(lambda: bool(complete_checkpoints(bench.run_dir(job_id))), bench.stop.set)
    is_saved = soon(lambda: bench.process is not None and not bench.process.is_running(), lambda: setattr(failing, "num_failures", 0))
    soon(lambda: not is_saved.is_alive() and failing.num_failures > 1, lambda: setattr(failing, "error", None))
    assert bench.run(job_id) == [QueuedJob(job_id, "default")]
    newest = step_of(complete_checkpoints(bench.run_dir(job_id))[-1])
    assert newest in {one.step for one in bench.artifacts(job_id, ArtifactKind.CHECKPOINT)}
