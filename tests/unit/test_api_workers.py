"""Workers over the API: the list, what a job waits for, what Prometheus reads, and the command."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta

from fastapi.testclient import TestClient
from prometheus_client.parser import text_string_to_metric_families

from cliprd_core.spec import JobSpec
from service.progress_view import status_of
from service.schemas import JobView
from service.store.models import Worker
from service.store.session import database_now
from tests.store_helpers import Sessions, claim, create, gpu, report, spec_dict


def lose(sessions: Sessions, worker_id: str) -> None:
    with sessions.begin() as session:
        session.get_one(Worker, worker_id).expires_at = database_now(session) - timedelta(seconds=1)


def test_workers_are_listed_with_what_they_do(client: TestClient, api_sessions: Sessions) -> None:
    assert client.get("/workers").json() == {"workers": []}
    report(api_sessions, "worker-1", gpus=(gpu(),))
    held = claim(api_sessions, create(api_sessions).id, worker="worker-1")
    (worker,) = client.get("/workers").json()["workers"]
    assert worker["started_at"] == worker["heartbeat_at"]
    del worker["started_at"], worker["heartbeat_at"]
    assert worker == {
        "id": "worker-1",
        "host": "machine",
        "state": "consuming",
        "queues": ["default"],
        "problems": [],
        "job_id": held.job.id,
        "gpus": [
            {
                "index": 0,
                "uuid": "GPU-0",
                "name": "NVIDIA H100",
                "utilization": 0.5,
                "memory_used_bytes": 10_000_000_000,
                "memory_total_bytes": 80_000_000_000,
                "temperature_celsius": 50.0,
            }
        ],
    }


def test_a_queued_job_says_that_no_worker_takes_its_queue(client: TestClient, api_sessions: Sessions) -> None:
    job_id = create(api_sessions, JobSpec.model_validate(spec_dict(resources={"queue": "h100"}))).id
    report(api_sessions, "worker-1")
    job = client.get(f"/jobs/{job_id}").json()
    assert job["waiting_for"] == "no worker takes queue 'h100'"
    assert status_of(JobView.model_validate(job)) == "queued: no worker takes queue 'h100'"
    report(api_sessions, "worker-2", queues=("h100",))
    assert client.get(f"/jobs/{job_id}").json()["waiting_for"] is None
    claim(api_sessions, job_id, worker="worker-2")
    lose(api_sessions, "worker-2")
    assert client.get(f"/jobs/{job_id}").json()["waiting_for"] is None, "it does not wait for a worker"


def samples(client: TestClient, prefix: str) -> dict[tuple[str, ...], float]:
    families = text_string_to_metric_families(client.get("/metrics").text)
    found = [one for family in families for one in family.samples if one.name.startswith(prefix)]
    assert len(found) == len({(one.name, *sorted(one.labels.items())) for one in found}), "Prometheus refuses a series that comes twice"
    return {(one.name.removeprefix(prefix), *(value for _, value in sorted(one.labels.items()))): one.value for one in found}


def test_prometheus_reads_workers_by_state_and_queue(client: TestClient, api_sessions: Sessions) -> None:
    assert samples(client, "cliprd_workers") == {}
    create(api_sessions, JobSpec.model_validate(spec_dict(resources={"queue": "a100"})))
    report(api_sessions, "worker-1", queues=("default", "h100"))
    report(api_sessions, "worker-2", queues=("h100",), problems=("broker: away",))
    report(api_sessions, "worker-3", queues=("h100",))
    lose(api_sessions, "worker-3")
    found = samples(client, "cliprd_workers")
    assert {key for key, value in found.items() if value == 1} == {
        ("", "default", "consuming"),
        ("", "h100", "consuming"),
        ("", "h100", "not_consuming"),
        ("", "h100", "lost"),
    }
    assert {key for key, value in found.items() if value == 0} == {
        ("", "default", "not_consuming"),
        ("", "default", "lost"),
        ("", "a100", "consuming"),
        ("", "a100", "not_consuming"),
        ("", "a100", "lost"),
    }


def test_prometheus_reads_each_gpu_once(client: TestClient, api_sessions: Sessions) -> None:
    silent = replace(gpu(), uuid="GPU-1", utilization=None, temperature_celsius=None)
    report(api_sessions, "worker-1", gpus=(gpu(), silent))
    report(api_sessions, "worker-2", gpus=(replace(gpu(), utilization=0.75),))
    report(api_sessions, "worker-3", host="another machine", gpus=(replace(gpu(), uuid="GPU-2"),))
    lose(api_sessions, "worker-3")
    labels = ("machine", "NVIDIA H100")
    assert samples(client, "cliprd_gpu_") == {
        ("utilization_ratio", "GPU-0", *labels): 0.75,
        ("memory_used_bytes", "GPU-0", *labels): 10e9,
        ("memory_total_bytes", "GPU-0", *labels): 80e9,
        ("temperature_celsius", "GPU-0", *labels): 50.0,
        ("memory_used_bytes", "GPU-1", *labels): 10e9,
        ("memory_total_bytes", "GPU-1", *labels): 80e9,
    }
