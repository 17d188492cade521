"""Jobs over the API."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx2
import pytest
from fastapi.testclient import TestClient

from service.settings import Settings
from service.store import jobs
from service.store.failure_policy import what_to_do
from tests.live import eventually
from tests.store_helpers import (
    FAILURE,
    SUCCESS,
    Sessions,
    claim,
    evaluated,
    finish,
    local_client,
    measured,
    report,
    sent_jobs,
    spec_dict,
    submit,
    write_table,
)


@pytest.fixture
def sessions(api_sessions: Sessions, tmp_path: Path) -> Sessions:
    write_table(tmp_path)
    return api_sessions


def problem(response: httpx2.Response, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    body: dict[str, Any] = response.json()
    assert set(body) == {"type", "title", "status", "detail", "instance", "errors"}
    assert body["status"] == status
    assert body["instance"] == response.request.url.path
    return body


def test_a_submitted_job_is_answered_whole_and_can_be_read(client: TestClient, sessions: Sessions, tmp_path: Path) -> None:
    report(sessions, "worker-1")
    response = client.post("/jobs", json=spec_dict(labels={"team": "a"}))
    assert response.status_code == 201
    job = response.json()
    assert response.headers["location"] == job["links"]["self"] == f"/jobs/{job['id']}"
    assert (job["state"], job["attempt"], job["recipe"], job["labels"]) == ("queued", 0, "clip", {"team": "a"})
    assert job["created_at"].endswith("Z")
    assert job["spec"]["data"]["train"][0]["path"] == f"{tmp_path}/pairs.tsv"
    objective = job["spec"]["objective"]
    assert [objective[name] for name in ("task", "fd", "icl", "hrd", "vrd", "xrd", "soft")] == [1, 0, 0, 0, 0, 0, 0]
    assert objective["scale_mode"] == "raw"
    assert [job[name] for name in ("started_at", "finished_at", "progress", "error", "result")] == [None] * 5
    assert job["metrics"] == {}
    assert client.get(job["links"]["self"]).json() == job
    for name in ("metrics", "evaluations", "artifacts"):
        assert client.get(job["links"][name]).status_code == 200
    answer = client.get(job["links"]["metrics"], params={"names": "train/loss"})
    assert answer.json() == {"series": {}, "unmatched": ["train/loss"], "names": []}, "it may come yet"


def test_a_submitted_job_is_sent(client: TestClient, sessions: Sessions, monkeypatch: pytest.MonkeyPatch) -> None:
    sent = sent_jobs(monkeypatch)
    job = submit(client, resources={"queue": "gpu"})
    eventually(lambda: sent or None)  # soon after the answer
    assert sent == [(job["id"], "gpu")]


def test_a_dry_run_answers_what_the_job_would_be_and_makes_none(client: TestClient, sessions: Sessions, tmp_path: Path) -> None:
    teacher = submit(client)
    changes: dict[str, Any] = {"recipe": "clip_kd", "teacher": {"job": teacher["id"]}, "training": {"global_batch_size": 2, "epochs": 3}}
    changes["training"]["warmup_steps"] = 1
    response = client.post("/jobs", params={"dry_run": True}, json=spec_dict(**changes))
    assert response.status_code == 200
    answer = response.json()
    assert (answer["num_pairs"], answer["num_steps"], answer["state_if_submitted"], answer["teacher_job_ids"]) == (
        4,
        6,
        "waiting",
        [teacher["id"]],
    )
    assert answer["spec"]["data"]["train"][0]["path"] == f"{tmp_path}/pairs.tsv"
    assert [job["id"] for job in client.get("/jobs").json()["jobs"]] == [teacher["id"]]
    assert submit(client, **changes)["spec"] == answer["spec"]
    for refused in ({"training": {"epochs": 0}}, {"recipe": "clip_kd", "teacher": {"job": "00000000-none"}}):
        problem(client.post("/jobs", params={"dry_run": True}, json=spec_dict(**refused)), 422)


@pytest.mark.parametrize("query", [{}, {"dry_run": True}])
def test_what_jobs_may_not_read_is_refused_whether_the_job_is_meant_or_not(
    client: TestClient, tmp_path_factory: pytest.TempPathFactory, query: dict[str, Any]
) -> None:
    outside = tmp_path_factory.mktemp("outside")
    write_table(outside)
    for source in ({"type": "csv", "path": f"{outside}/pairs.tsv"}, {"type": "webdataset", "shards": "http://127.0.0.1/0.tar"}):
        body = problem(client.post("/jobs", params=query, json=spec_dict(data={"train": [source]})), 422)
        assert "jobs may read" in body["errors"][0]["problem"]


def test_what_a_run_reports_shows_on_its_job(client: TestClient, sessions: Sessions) -> None:
    job = submit(client)
    claimed = claim(sessions, job["id"])
    with sessions.begin() as session:
        lease: dict[str, Any] = {"session": session, "job_id": job["id"], "lease_token": claimed.lease_token}
        jobs.mark_started(**lease)
        jobs.record_metrics(**lease, records=[measured(step, train_loss=1 / step, train_lr=0.1) for step in range(1, 11)])
        jobs.record_evaluations(**lease, records=[evaluated(10)])
    running = client.get(f"/jobs/{job['id']}").json()
    assert (running["state"], running["attempt"], running["worker"]) == ("running", 1, "worker-1")
    assert running["progress"]["step"] == 10
    assert set(running["progress"]) == {"step", "num_steps", "epoch", "samples_seen", "samples_per_second", "eta_seconds", "device"}
    assert running["metrics"] == {"train/loss": 0.1, "train/lr": 0.1}

    whole = client.get(f"/jobs/{job['id']}/metrics").json()["series"]
    assert set(whole) == {"train/loss", "train/lr"}
    assert whole["train/loss"] == {"steps": list(range(1, 11)), "values": [1 / step for step in range(1, 11)]}
    query: dict[str, str | int] = {"names": "train/loss,nothing", "since_step": 3, "max_points": 4}
    assert client.get(f"/jobs/{job['id']}/metrics", params=query).json() == {
        "series": {"train/loss": {"steps": [3, 10], "values": [1 / 3, 1 / 10]}},
        "unmatched": ["nothing"],
        "names": ["train/loss", "train/lr"],
    }
    query["names"] = "train/*,train/lr,tran/*,nothing,nothing"
    assert client.get(f"/jobs/{job['id']}/metrics", params=query).json()["unmatched"] == ["tran/*", "nothing"]

    assert client.get(f"/jobs/{job['id']}/evaluations").json() == {
        "evaluations": [{**evaluated(10).model_dump(mode="json"), "time": "1970-01-01T00:00:01Z"}],
        "next_cursor": None,
    }
    finish(sessions, claimed)
    done = client.get(f"/jobs/{job['id']}").json()
    assert (done["state"], done["result"], done["error"]) == ("succeeded", SUCCESS.model_dump(mode="json"), None)


def test_a_failed_job_says_why(client: TestClient, sessions: Sessions) -> None:
    job = submit(client)
    finish(sessions, claim(sessions, job["id"]), FAILURE)
    failed = client.get(f"/jobs/{job['id']}").json()
    expected = {"reason": "diverged", "message": FAILURE.message, "what_to_do": what_to_do(FAILURE), "detail": ""}
    assert failed["error"] == expected
    assert what_to_do(FAILURE).startswith(f"{FAILURE.advice} Clone the job")
    schema = client.get("/openapi.json").json()["components"]["schemas"]["JobErrorView"]
    assert "what_to_do" in schema["required"]
    assert schema["properties"]["what_to_do"]["description"]


def test_cancelling(client: TestClient, sessions: Sessions) -> None:
    queued, running = submit(client), submit(client)
    claimed = claim(sessions, running["id"])
    response = client.post(queued["links"]["cancel"])
    assert (response.status_code, response.json()["state"]) == (200, "cancelled")
    for _ in range(2):
        response = client.post(running["links"]["cancel"])
        assert (response.status_code, response.json()["state"]) == (202, "running")
        assert response.json()["cancel_requested_at"] is not None
    finish(sessions, claimed, jobs.Cancelled())
    for job in (queued, running):
        assert client.post(job["links"]["cancel"]).status_code == 200
    failed = submit(client)
    finish(sessions, claim(sessions, failed["id"]), FAILURE)
    body = problem(client.post(failed["links"]["cancel"]), 409)
    assert "has finished already (failed)" in body["detail"]


def test_lists_with_filters_and_pages(client: TestClient, sessions: Sessions) -> None:
    ids = [submit(client, labels={"team": "a" if number % 2 else "b", "run": str(number)})["id"] for number in range(5)]
    claim(sessions, ids[1])

    def listed(**query: Any) -> list[str]:
        return [job["id"] for job in client.get("/jobs", params=query).json()["jobs"]]

    assert listed() == ids[::-1]
    assert listed(label="team=a") == [ids[3], ids[1]]
    assert listed(label=["team=a", "run=3"]) == [ids[3]]
    assert listed(label="team=a", state="running") == [ids[1]]
    first = client.get("/jobs", params={"limit": 3}).json()
    second = client.get("/jobs", params={"limit": 3, "cursor": first["next_cursor"]}).json()
    assert [job["id"] for job in first["jobs"] + second["jobs"]] == ids[::-1]
    assert second["next_cursor"] is None


@pytest.mark.parametrize(
    ("query", "field"),
    [
        ("label=team", "label"),
        ("label=a=1&label=a=2", "label"),
        ("label=a%00=b", "label"),
        ("cursor=zz", "cursor"),
        ("limit=0", "limit"),
        ("limit=201", "limit"),
        ("state=done", "state"),
    ],
)
def test_bad_queries_name_their_field(client: TestClient, query: str, field: str) -> None:
    body = problem(client.get(f"/jobs?{query}"), 422)
    assert [one["field"] for one in body["errors"]] == [field]
    assert body["errors"][0]["remedy"]


def test_a_student_waits_for_its_teacher(client: TestClient, sessions: Sessions) -> None:
    teacher = submit(client)
    student = submit(client, recipe="clip_kd", teacher={"job": teacher["id"]})
    assert (student["state"], student["queued_at"], student["teacher_job_ids"]) == ("waiting", None, [teacher["id"]])
    client.post(teacher["links"]["cancel"])
    assert client.get(f"/jobs/{student['id']}").json()["error"]["reason"] == "teacher_unavailable"
    response = client.post("/jobs", json=spec_dict(recipe="clip_kd", teacher={"job": teacher["id"]}))
    (error,) = problem(response, 422)["errors"]
    assert error["field"] == "teacher.job"
    assert "cancelled" in error["problem"]


@pytest.mark.parametrize("path", ["/jobs/00000000-none", "/jobs/%00", "/jobs/UPPER", "/jobs/00000000-none/metrics", "/jobs/x/evaluations"])
def test_jobs_that_do_not_exist(client: TestClient, path: str) -> None:
    assert "there is no job" in problem(client.get(path), 404)["detail"]


def test_links_know_where_a_proxy_has_mounted_the_api(settings: Settings, tmp_path: Path) -> None:
    from service.app import create_app

    write_table(tmp_path)
    with local_client(create_app(settings), root_path="/cliprd") as client:
        job = submit(client)
    assert job["links"]["metrics"] == f"/cliprd/jobs/{job['id']}/metrics"
