"""The `cliprd` command and the client behind it, against the real API on a port of its own; the tests do the worker's part."""

from __future__ import annotations

import hashlib
import json
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from sqlalchemy.orm import Session
from typer.testing import CliRunner

import service.client
from cliprd_core.run_dir import MetricsRecord, Progress, ResultRecord
from cliprd_core.spec import JobSpec
from cliprd_core.store_dir import lock_shared
from service.app import create_app
from service.cli import app
from service.client import Client, CliprdError
from service.progress_view import duration
from service.settings import Settings
from service.store.artifacts import register_artifacts
from service.store.blobs import BlobStore
from service.store.failure_policy import what_to_do
from service.store.jobs import Cancelled, claim_job, finish_job, record_metrics, request_cancel
from service.store.kinds import ArtifactKind
from service.store.logs import append_log
from service.store.session import make_engine, make_sessions
from service.store.workers import report_worker
from tests.store_helpers import FAILURE, gpu
from tests.teacher_store_helpers import make_store
from tests.tiny import tiny_spec, write_shards

WEIGHTS = bytes(range(256)) * 40


class Bench:
    """The API, the store below it, and the command in front of it."""

    def __init__(self, url: str, settings: Settings) -> None:
        self.url = url
        self.settings = settings
        self.spec_file = settings.data_root / "spec.json"
        spec = tiny_spec(write_shards(settings.data_root / "shards", 32)).model_dump(mode="json")
        self.spec_file.write_text(json.dumps(spec))

    @contextmanager
    def session(self) -> Iterator[Session]:
        engine = make_engine(self.settings.database_url)
        with make_sessions(engine).begin() as session:
            yield session
        engine.dispose()

    def client(self, transport: httpx.BaseTransport | None = None) -> Client:
        return Client(self.url, transport=transport)

    def run(self, *arguments: str) -> tuple[int, str, str]:
        """Exit code, standard output, standard error."""
        result = CliRunner(env={"CLIPRD_URL": self.url, "COLUMNS": "200"}).invoke(app, list(arguments))
        assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
        return result.exit_code, result.stdout, result.stderr

    def submit(self) -> str:
        return self.run("submit", str(self.spec_file))[1].strip()

    def succeed(self, job_id: str) -> None:
        """Do what a worker does for a job that ends well."""
        blob = BlobStore(self.settings.artifacts_root).put_file(self._file("weights", WEIGHTS))
        progress = Progress(step=8, num_steps=8, epoch=2, samples_seen=64, samples_per_second=9.5, eta_seconds=0)
        metrics = MetricsRecord(attempt=1, step=8, time=0, progress=progress, values={"train/loss": 1.25})
        result = ResultRecord(
            step=8,
            samples_seen=64,
            num_student_parameters=1_615_937,
            num_teacher_parameters=None,
            num_corrupt_samples=0,
            train_seconds=3,
            export_files=["weights.bin"],
        )
        with self.session() as session:
            claim = claim_job(session=session, job_id=job_id, worker="test", lease_seconds=60)
            assert claim is not None
            held: dict[str, Any] = {"session": session, "job_id": job_id, "lease_token": claim.lease_token}
            record_metrics(**held, records=[metrics])
            register_artifacts(**held, kind=ArtifactKind.MODEL, group="export", files={"weights.bin": blob})
            finish_job(**held, outcome=result)

    def _file(self, name: str, content: bytes) -> Path:
        path = self.settings.data_root / name
        path.write_bytes(content)
        return path


@pytest.fixture
def bench(settings: Settings) -> Iterator[Bench]:
    server = uvicorn.Server(uvicorn.Config(create_app(settings), port=0, ws="none", log_level="warning"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        assert thread.is_alive(), "the API did not start"
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    yield Bench(f"http://127.0.0.1:{port}", settings)
    server.should_exit = True
    thread.join()


def test_submit_prints_the_id_alone_and_the_job_is_listed_and_shown(bench: Bench) -> None:
    job_id = bench.submit()
    assert len(job_id) == 36
    code, listed, _ = bench.run("jobs", "--state", "queued")
    assert code == 0
    assert job_id in listed
    assert job_id not in bench.run("jobs", "--state", "failed")[1]
    assert job_id not in bench.run("jobs", "--label", "colour=red")[1]
    _, shown, _ = bench.run("show", job_id)
    assert "queued" in shown
    assert "not started" in shown


def test_a_refused_spec_names_every_field_with_its_remedy(bench: Bench) -> None:
    spec = json.loads(bench.spec_file.read_text())
    spec["training"]["epochz"] = 3
    spec["training"]["epochs"] = 0
    bench.spec_file.write_text(json.dumps(spec))
    code, _, stderr = bench.run("submit", str(bench.spec_file))
    assert code == 1
    assert "training.epochz" in stderr
    assert "training.epochs" in stderr
    assert "Traceback" not in stderr


@pytest.mark.parametrize(("content", "complaint"), [("{", "is not JSON"), ("[]", "must hold a JSON object")])
def test_a_file_that_is_no_spec_is_named(bench: Bench, content: str, complaint: str) -> None:
    bench.spec_file.write_text(content)
    code, _, stderr = bench.run("submit", str(bench.spec_file))
    assert code == 1
    assert complaint in stderr
    assert str(bench.spec_file) in stderr


def test_a_failed_job_says_what_to_do(bench: Bench) -> None:
    job_id = bench.submit()
    with bench.session() as session:
        claim = claim_job(session=session, job_id=job_id, worker="test", lease_seconds=60)
        assert claim is not None
        finish_job(session=session, job_id=job_id, lease_token=claim.lease_token, outcome=FAILURE)
    code, _, stderr = bench.run("watch", job_id)
    assert code == 1
    assert f"cliprd: diverged: {FAILURE.message}\nWhat to do: {what_to_do(FAILURE)}" in stderr
    shown = " ".join(bench.run("show", job_id)[1].split())
    assert f"error diverged: {FAILURE.message}" in shown
    assert "attempt 1; 1 failed, of at most 3" in shown
    assert f"what to do {what_to_do(FAILURE)}" in shown


def test_an_unknown_job_is_one_clear_line(bench: Bench) -> None:
    for command in ("show", "watch", "cancel", "download"):
        code, _, stderr = bench.run(command, "no-such-job")
        assert code == 1
        assert "there is no job 'no-such-job'" in stderr
        assert len(stderr.splitlines()) == 1


def test_cancelling_ends_the_watch_with_exit_code_1(bench: Bench) -> None:
    job_id = bench.submit()
    assert bench.run("cancel", job_id) == (0, "cancelled\n", "")
    code, stdout, _ = bench.run("watch", job_id)
    assert code == 1
    assert "cancelled" in stdout
    assert bench.run("cancel", job_id) == (0, "cancelled\n", "")


def test_the_address_may_stand_before_or_after_the_command_or_in_the_environment(bench: Bench) -> None:
    job_id, elsewhere = bench.submit(), "http://127.0.0.1:1"
    for before, after in (((), ("--url", bench.url)), (("--url", bench.url), ()), (("--url", elsewhere), ("--url", bench.url))):
        arguments = [*before, "jobs", *after]
        result = CliRunner(env={"CLIPRD_URL": elsewhere, "COLUMNS": "200"}).invoke(app, arguments)
        assert job_id in result.stdout, arguments
    for arguments in (["--url", elsewhere, "jobs"], ["stores", "--url", elsewhere, "delete", "a" * 32]):
        assert f"no answer from {elsewhere}" in bench.run(*arguments)[2], arguments
    for command in ("up", "migrate", "keys"):
        assert bench.run("--url", bench.url, command) == (1, "", f"cliprd: `{command}` asks no service; leave --url out\n")


def test_no_key_is_made_for_a_service_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("CLIPRD_DATABASE_URL", raising=False)
    for arguments in (["create", "--scope", "read", "--name", "x"], ["list"]):
        result = CliRunner().invoke(app, ["keys", *arguments])
        assert result.exit_code == 1
        assert "--database sqlite:///HOME/cliprd.db" in result.stderr
    assert list(tmp_path.iterdir()) == []
    named = CliRunner().invoke(app, ["keys", "list", "--database", f"sqlite:///{tmp_path}/new.db"])
    assert named.exit_code == 0


def test_checking_a_spec_submits_nothing(bench: Bench) -> None:
    code, stdout, _ = bench.run("check", str(bench.spec_file))
    assert code == 0
    assert json.loads(stdout)["num_pairs"] == 32
    code, resolved, _ = bench.run("check", str(bench.spec_file), "--spec")
    assert code == 0
    assert JobSpec.model_validate_json(resolved).model_dump(mode="json") == json.loads(stdout)["spec"], "a file for the trainer"
    assert bench.run("jobs")[1].splitlines() == ["id  name  state  attempt  status"]


def test_pausing_and_resuming(bench: Bench) -> None:
    job_id = bench.submit()
    assert bench.run("pause", job_id) == (0, "paused\n", "")
    assert "paused" in bench.run("show", job_id)[1]
    assert bench.run("resume", job_id) == (0, "queued\n", "")
    with bench.session() as session:
        assert claim_job(session=session, job_id=job_id, worker="test", lease_seconds=60) is not None
    assert bench.run("pause", job_id) == (0, "its worker was asked to pause it\n", "")
    assert "pausing" in bench.run("show", job_id)[1]


def test_cancelling_by_label_retrying_cloning_and_deleting(bench: Bench, tmp_path: Path) -> None:
    spec = json.loads(bench.spec_file.read_text())
    bench.spec_file.write_text(json.dumps({**spec, "labels": {"sweep": "1"}}))
    first = bench.submit()
    overrides = tmp_path / "overrides.json"
    overrides.write_text('{"name": "a copy", "training": {"learning_rate": 0.0001}}')
    second = bench.run("clone", first, "--overrides", str(overrides))[1].strip()
    assert "a copy" in bench.run("show", second)[1]
    assert bench.run("cancel", "--label", "sweep=1")[1].splitlines() == [f"{one}  cancelled" for one in (second, first)]
    assert bench.run("cancel", "--label", "sweep=1") == (0, "no unfinished job has these labels\n", "")
    assert bench.run("cancel")[0] == 1
    assert bench.run("retry", first) == (0, "queued\n", "")
    assert "cancel it first" in bench.run("delete", first)[2]
    assert bench.run("delete", second) == (0, "deleted\n", "")
    assert "there is no job" in bench.run("show", second)[2]


def test_events_and_log(bench: Bench) -> None:
    job_id = bench.submit()
    with bench.session() as session:
        claim = claim_job(session=session, job_id=job_id, worker="test", lease_seconds=60)
        assert claim is not None
        append_log(session=session, job_id=job_id, lease_token=claim.lease_token, text="one\n[two]\n")
        request_cancel(session=session, job_id=job_id)
        finish_job(session=session, job_id=job_id, lease_token=claim.lease_token, outcome=Cancelled())
    _, stdout, _ = bench.run("events", job_id)
    assert [line.split("  ")[2] for line in stdout.splitlines()] == ["created", "queued", "claimed", "cancel_requested", "cancelled"]
    assert bench.run("log", job_id) == (0, "one\n[two]\n", "")
    assert bench.run("log", job_id, "--tail", "1") == (0, "[two]\n", "")
    assert bench.run("log", job_id, "--follow") == (0, "one\n[two]\n", "")


def test_watching_and_downloading_a_job_that_ended_well(bench: Bench, tmp_path: Path) -> None:
    job_id = bench.submit()
    bench.succeed(job_id)
    code, stdout, _ = bench.run("watch", job_id)
    assert code == 0
    assert "100%" in stdout
    folder = tmp_path / "student"
    code, stdout, _ = bench.run("download", job_id, "--to", str(folder))
    assert code == 0
    assert f'create_model_and_transforms("local-dir:{folder}")' in stdout
    assert [path.name for path in folder.iterdir()] == ["weights.bin"]
    assert (folder / "weights.bin").read_bytes() == WEIGHTS


def test_downloading_from_a_job_without_a_model_says_so(bench: Bench) -> None:
    assert "has no model" in bench.run("download", bench.submit())[2]


def test_no_service_is_one_clear_line() -> None:
    result = CliRunner(env={"CLIPRD_URL": "http://127.0.0.1:1"}).invoke(app, ["jobs"])
    assert result.exit_code == 1
    assert "cliprd up" in result.stderr
    assert len(result.stderr.splitlines()) == 1


class Breaking(httpx.BaseTransport):
    """The network, but artifact downloads break off after `num_bytes`, `num_breaks` times."""

    def __init__(self, num_bytes: int, num_breaks: int) -> None:
        self.inner = httpx.HTTPTransport()
        self.num_bytes = num_bytes
        self.num_breaks = num_breaks
        self.ranges: list[str | None] = []

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        response = self.inner.handle_request(request)
        if not request.url.path.startswith("/artifacts/"):
            return response
        self.ranges.append(request.headers.get("Range"))
        content = response.read()
        response.close()
        is_breaking = self.num_breaks > 0
        self.num_breaks -= 1

        def stream() -> Iterator[bytes]:
            yield content[: self.num_bytes] if is_breaking else content
            if is_breaking:
                raise httpx.ReadError("connection lost")

        headers = {key: value for key, value in response.headers.items() if key != "content-length"}
        return httpx.Response(response.status_code, headers=headers, content=stream())

    def close(self) -> None:
        self.inner.close()


def test_a_download_that_breaks_off_is_continued_where_it_was(bench: Bench, tmp_path: Path) -> None:
    job_id = bench.submit()
    bench.succeed(job_id)
    breaking = Breaking(num_bytes=3000, num_breaks=2)
    with bench.client(breaking) as client:
        (path,) = client.download_model(job_id, tmp_path / "model")
    assert path.read_bytes() == WEIGHTS
    assert breaking.ranges == [None, "bytes=3000-", "bytes=6000-"]


def test_a_download_given_up_is_continued_by_the_next_call(bench: Bench, tmp_path: Path) -> None:
    job_id = bench.submit()
    bench.succeed(job_id)
    with bench.client(Breaking(num_bytes=100, num_breaks=99)) as client, pytest.raises(CliprdError, match="broke off"):
        client.download_model(job_id, tmp_path / "model")
    assert not (tmp_path / "model" / "weights.bin").exists()
    second = Breaking(num_bytes=0, num_breaks=0)
    with bench.client(second) as client:
        (path,) = client.download_model(job_id, tmp_path / "model")
    assert hashlib.sha256(path.read_bytes()).digest() == hashlib.sha256(WEIGHTS).digest()
    assert second.ranges == ["bytes=500-"]


def test_damaged_bytes_are_refused_and_not_kept(bench: Bench, tmp_path: Path) -> None:
    job_id = bench.submit()
    bench.succeed(job_id)
    with bench.client() as client:
        (artifact,) = client.artifacts(job_id)
        (blob,) = [path for path in bench.settings.artifacts_root.rglob("*") if path.is_file()]
        blob.write_bytes(WEIGHTS[::-1])
        with pytest.raises(CliprdError, match="SHA-256"):
            client.download(artifact, tmp_path / "model")
    assert not list((tmp_path / "model").iterdir())


def test_all_pages_of_jobs_are_fetched(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service.client, "PAGE_SIZE", 2)
    submitted = [bench.submit() for _ in range(5)]
    with bench.client() as client:
        assert [job.id for job in client.jobs()] == submitted[::-1]


@pytest.mark.parametrize(("seconds", "shown"), [(8.4, "8 s"), (59.6, "1:00"), (185, "3:05"), (7385, "2:03:05")])
def test_durations_read_well(seconds: float, shown: str) -> None:
    assert duration(seconds) == shown


def test_workers_are_listed(bench: Bench) -> None:
    with bench.session() as session:
        common = {"host": "machine", "gpus": [gpu()], "valid_seconds": 60}
        report_worker(session=session, worker_id="worker-1", queues=["default", "h100"], problems=[], **common)
        report_worker(session=session, worker_id="worker-2", queues=["a100"], problems=["broker: away"], **common)
    code, listed, _ = bench.run("workers")
    assert code == 0
    _, first, second = (" ".join(line.split()) for line in listed.splitlines())
    assert "worker-1 consuming default, h100 NVIDIA H100 50% 10 of 80 GB" in first
    assert "worker-2 not_consuming: broker: away a100" in second


def test_teacher_stores_are_listed_and_deleted(bench: Bench) -> None:
    root = bench.settings.teacher_store_root
    key = make_store(root)
    code, listed, _ = bench.run("stores")
    assert code == 0
    assert key in listed
    assert "ViT-B-16" in listed
    lock = lock_shared(root / key)
    assert lock is not None
    code, _, stderr = bench.run("stores", "delete", key)
    assert code == 1
    assert "is in use" in stderr
    os.close(lock)
    assert bench.run("stores", "delete", key) == (0, "deleted\n", "")
    assert key not in bench.run("stores")[1]
    code, _, stderr = bench.run("stores", "delete", key)
    assert code == 1
    assert "there is no teacher store" in stderr
