"""Jobs that exist, steered over the API."""

from __future__ import annotations

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from cliprd_core.run_dir import ErrorReason, ErrorRecord
from service.app import create_app
from service.settings import Settings
from service.store import jobs
from service.store.artifacts import ArtifactKind, register_artifacts
from service.store.blobs import BlobStore, StoredBlob
from service.store.models import Job
from service.store.unneeded_blobs import take_unneeded
from tests.store_helpers import FAILURE, Sessions, claim, finish, local_client, report, sent_jobs, spec_dict, submit, write_table

LOST = ErrorRecord(reason=ErrorReason.WORKER_LOST, message="A training process was killed.")


@pytest.fixture
def sessions(api_sessions: Sessions, tmp_path: Path) -> Sessions:
    write_table(tmp_path)
    return api_sessions


def test_pausing_and_resuming(client: TestClient, sessions: Sessions, monkeypatch: pytest.MonkeyPatch) -> None:
    queued, running = submit(client), submit(client)
    claimed = claim(sessions, running["id"])
    for _ in range(2):
        response = client.post(queued["links"]["pause"])
        assert (response.status_code, response.json()["state"]) == (200, "paused")
        response = client.post(running["links"]["pause"])
        assert (response.status_code, response.json()["state"]) == (202, "running")
        assert response.json()["pause_requested_at"] is not None
    with sessions.begin() as session:
        assert jobs.release_job(session=session, job_id=running["id"], lease_token=claimed.lease_token) is None
    assert [job["id"] for job in client.get("/jobs", params={"state": "paused"}).json()["jobs"]] == [running["id"], queued["id"]]
    sent = sent_jobs(monkeypatch)
    for job in (queued, running):
        response = client.post(job["links"]["resume"])
        assert (response.status_code, response.json()["state"]) == (200, "queued")
    assert [one.job_id for one in sent] == [queued["id"], running["id"]]


def test_asking_again_for_what_is_so_changes_nothing(client: TestClient, sessions: Sessions) -> None:
    queued, cancelled, running = submit(client), submit(client), submit(client)
    claim(sessions, running["id"])
    client.post(cancelled["links"]["cancel"])
    for job, link, state in ((queued, "resume", "queued"), (running, "resume", "running"), (cancelled, "cancel", "cancelled")):
        events = client.get(job["links"]["events"]).json()
        response = client.post(job["links"][link])
        assert (response.status_code, response.json()["state"]) == (200, state)
        assert client.get(job["links"]["events"]).json() == events


def test_what_is_being_cancelled_or_has_ended_is_neither_paused_nor_resumed(client: TestClient, sessions: Sessions) -> None:
    running, ended = submit(client), submit(client)
    claim(sessions, running["id"])
    for job in (running, ended):
        client.post(job["links"]["cancel"])
        for link in ("pause", "resume"):
            response = client.post(job["links"][link])
            assert response.status_code == 409, response.text
    assert client.post("/jobs/00000000-none/pause").status_code == 404


def test_retrying(client: TestClient, sessions: Sessions) -> None:
    job = submit(client)
    assert client.post(job["links"]["retry"]).status_code == 409
    finish(sessions, claim(sessions, job["id"]), FAILURE)
    again = client.post(job["links"]["retry"]).json()
    assert (again["state"], again["error"], again["finished_at"]) == ("queued", None, None)


def test_of_all_attempts_the_failed_ones_count_towards_the_most_there_may_be(client: TestClient, sessions: Sessions) -> None:
    job = submit(client)

    def counts() -> tuple[int, int, int]:
        now = client.get(job["links"]["self"]).json()
        return now["attempt"], now["failed_attempts"], now["max_attempts"]

    assert counts() == (0, 0, 3)
    claimed = claim(sessions, job["id"])
    client.post(job["links"]["pause"])
    with sessions.begin() as session:
        jobs.release_job(session=session, job_id=job["id"], lease_token=claimed.lease_token)
    assert counts() == (1, 0, 3)
    client.post(job["links"]["resume"])
    claimed = claim(sessions, job["id"])
    client.post(job["links"]["cancel"])
    finish(sessions, claimed, jobs.Cancelled())
    assert counts() == (2, 0, 3)
    client.post(job["links"]["retry"])
    finish(sessions, claim(sessions, job["id"]), LOST)
    assert counts() == (3, 1, 3)
    claimed = claim(sessions, job["id"])
    assert counts() == (4, 1, 3)
    finish(sessions, claimed)
    assert counts() == (4, 1, 3)


def test_a_clone_is_the_same_spec_with_some_fields_replaced_and_checked(client: TestClient, sessions: Sessions) -> None:
    job = submit(client, labels={"a": "1"})
    response = client.post(job["links"]["clone"], json={"name": "copy", "training": {"epochs": 3}, "labels": {"b": "2"}})
    assert response.status_code == 201
    clone = response.json()
    assert response.headers["location"] == clone["links"]["self"] != job["links"]["self"]
    assert clone["labels"] == {"a": "1", "b": "2"}
    assert clone["spec"] == {**job["spec"], "name": "copy", "labels": clone["labels"], "training": {**job["spec"]["training"], "epochs": 3}}
    assert client.post(job["links"]["clone"]).json()["spec"] == job["spec"]
    assert client.post(clone["links"]["clone"], json={"labels": {"a": None}}).json()["labels"] == {"b": "2"}
    for overrides, field in (
        ({"training": {"epochs": 0}}, "training.epochs"),
        ({"training": {"epochz": 1}}, "training.epochz"),
        ({"training": {"global_batch_size": 100}}, "training.global_batch_size"),
        ({"recipe": "clip_rd"}, "recipe"),
    ):
        response = client.post(job["links"]["clone"], json=overrides)
        assert response.status_code == 422, response.text
        assert field in [one["field"] for one in response.json()["errors"]]


def test_deleting(client: TestClient, sessions: Sessions) -> None:
    job = submit(client)
    assert client.delete(job["links"]["self"]).status_code == 409
    client.post(job["links"]["cancel"])
    assert client.delete(job["links"]["self"]).status_code == 204
    assert client.get(job["links"]["self"]).status_code == 404
    assert client.delete(job["links"]["self"]).status_code == 404


def test_deleting_leaves_the_bytes_to_the_workers(client: TestClient, sessions: Sessions, monkeypatch: pytest.MonkeyPatch) -> None:
    """An artifact store that says nothing would hold up the answer for minutes."""

    def unreachable(_self: BlobStore, _key: str) -> None:
        raise AssertionError("the request deletes bytes")

    monkeypatch.setattr(BlobStore, "delete", unreachable)
    job = submit(client)
    claimed = claim(sessions, job["id"])
    with sessions.begin() as session:
        register_artifacts(
            session=session,
            job_id=job["id"],
            lease_token=claimed.lease_token,
            kind=ArtifactKind.MODEL,
            group="export",
            files={"model": StoredBlob("ab/" + "ab" * 16, 1, "0" * 64)},
        )
    finish(sessions, claimed)
    assert client.delete(job["links"]["self"]).status_code == 204
    with sessions.begin() as session:
        assert take_unneeded(session=session) == ["ab/" + "ab" * 16]


def test_cancelling_by_label(client: TestClient, sessions: Sessions) -> None:
    running, waiting, other = submit(client, labels={"s": "1"}), submit(client, labels={"s": "1", "t": "2"}), submit(client)
    student = submit(client, labels={"s": "1"}, recipe="clip_kd", teacher={"job": running["id"]})
    claim(sessions, running["id"])
    response = client.post("/jobs/cancel", json={"labels": {"s": "1"}})
    assert response.json() == {"cancelled": [student["id"], waiting["id"]], "requested": [running["id"]]}
    assert client.get(other["links"]["self"]).json()["state"] == "queued"
    assert client.get(student["links"]["self"]).json()["state"] == "cancelled"
    assert client.post("/jobs/cancel", json={"labels": {}}).status_code == 422


def test_an_idempotency_key_makes_one_job(client: TestClient, sessions: Sessions, tmp_path: Path) -> None:
    report(sessions, "worker-1")
    headers = {"Idempotency-Key": "a-key"}
    first = client.post("/jobs", json=spec_dict(), headers=headers)
    (tmp_path / "pairs.tsv").unlink()  # a repeated submission is answered, not checked again
    again = client.post("/jobs", json=dict(reversed(spec_dict().items())), headers=headers)
    assert (first.status_code, again.status_code) == (201, 201)
    assert again.json() == client.get(first.headers["location"]).json()
    assert again.headers["location"] == first.headers["location"]
    assert "idempotency-replayed" not in first.headers
    assert again.headers["idempotency-replayed"] == "true"
    refused = client.post("/jobs", json=spec_dict(name="other"), headers=headers)
    assert refused.status_code == 422
    assert [one["field"] for one in refused.json()["errors"]] == ["Idempotency-Key"]
    assert client.post("/jobs", json=spec_dict(), headers={"Idempotency-Key": "x" * 256}).status_code == 422
    assert len(client.get("/jobs").json()["jobs"]) == 1


def test_a_late_repeat_does_not_bring_a_deleted_job_back(client: TestClient, sessions: Sessions, tmp_path: Path) -> None:
    write_table(tmp_path)
    headers = {"Idempotency-Key": "a-key"}
    job_id = client.post("/jobs", json=spec_dict(), headers=headers).json()["id"]
    assert client.post(f"/jobs/{job_id}/cancel").status_code == 200
    assert client.delete(f"/jobs/{job_id}").status_code == 204
    for _ in range(2):
        refused = client.post("/jobs", json=spec_dict(), headers=headers)
        assert (refused.status_code, refused.json()["type"]) == (422, "urn:cliprd:problem:invalid-request")
        [problem] = refused.json()["errors"]
        assert problem["field"] == "Idempotency-Key"
        assert f"{job_id}, which was deleted" in problem["problem"]
        (tmp_path / "pairs.tsv").unlink(missing_ok=True)  # the same where what the spec names is gone
    with sessions() as session:
        assert session.query(Job).count() == 0


@pytest.mark.parametrize("key", [None, "used", "new"])
def test_a_spec_that_has_no_json_is_refused_under_any_key(client: TestClient, tmp_path: Path, key: str | None) -> None:
    write_table(tmp_path)
    assert client.post("/jobs", json=spec_dict(), headers={"Idempotency-Key": "used"}).status_code == 201
    headers = {"Content-Type": "application/json", **({} if key is None else {"Idempotency-Key": key})}
    nested = "{}"
    for _ in range(300):
        nested = f'{{"x": {nested}}}'
    for entry in (f'"x": {nested}', '"\\ud800": 1', '"x": NaN'):
        content = json.dumps(spec_dict()).replace('"vision_cfg": {', f'"vision_cfg": {{{entry}, ')
        refused = client.post("/jobs", content=content, headers=headers)
        assert refused.status_code == 422, refused.text
        assert {one["field"].startswith("student.config.vision_cfg") for one in refused.json()["errors"]} == {True}


def test_two_apis_at_once_make_one_job_of_one_key(database_url: str, settings: Settings, tmp_path: Path) -> None:
    write_table(tmp_path)
    with ExitStack() as stack:
        apps = [create_app(settings.model_copy(update={"database_url": database_url})) for _ in range(2)]
        both = [stack.enter_context(local_client(app)) for app in apps]
        for client in both:  # the framework makes its routes ready at the first request, which two threads at once would warn about
            assert client.get("/jobs").status_code == 200
        for number in range(5):
            gate = threading.Barrier(2)

            def post(client: TestClient, key: str, gate: threading.Barrier) -> str:
                gate.wait()
                response = client.post("/jobs", json=spec_dict(), headers={"Idempotency-Key": key})
                assert response.status_code == 201, response.text
                return str(response.json()["id"])

            with ThreadPoolExecutor(2) as pool:
                answers = [pool.submit(post, client, f"key-{number}", gate) for client in both]
                assert len({answer.result() for answer in answers}) == 1
        assert len(both[0].get("/jobs").json()["jobs"]) == 5
