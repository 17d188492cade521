"""What a dry run says a job would take."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import select

from cliprd_core.run_dir import MetricsRecord
from cliprd_core.spec import JobSpec
from service.app import create_app
from service.settings import Settings
from service.store import jobs
from service.store.models import Job
from tests.store_helpers import Sessions, claim, create, finish, gpu, local_client, measured, report, spec_dict, write_table, write_tar

CONFIG = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16},
    "text_cfg": {"width": 16, "heads": 2, "layers": 1, "vocab_size": 100},
}
IMAGE_PARAMETERS = 3 * 16 * 16 * 32 + 32 + 5 * 32 + 64 + (4 * 32 * 32 + 8 * 32 * 32 + 13 * 32) + 64 + 32 * 16
TEXT_PARAMETERS = 100 * 16 + 77 * 16 + (12 * 16 * 16 + 13 * 16) + 32 + 16 * 16


@pytest.fixture
def sessions(api_sessions: Sessions, tmp_path: Path) -> Sessions:
    write_table(tmp_path)
    return api_sessions


def asked(client: TestClient, **changes: Any) -> dict[str, Any]:
    response = client.post("/jobs", params={"dry_run": True}, json=spec_dict(**{"student": {"config": CONFIG}, **changes}))
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def on(device: str | None, step: int, speed: float) -> MetricsRecord:
    record = measured(step)
    return record.model_copy(
        update={
            "values": {"train/samples_per_second": speed},
            "progress": record.progress.model_copy(update={"device": device}),
        }
    )


def trained(sessions: Sessions, *speeds: float, device: str | None = "cpu", **changes: Any) -> str:
    """A finished job that recorded these speeds."""
    job = create(sessions, JobSpec.model_validate(spec_dict(**{"student": {"config": CONFIG}, **changes})))
    claimed = claim(sessions, job.id)
    records = [on(device, step, speed) for step, speed in enumerate(speeds, start=1)]
    with sessions.begin() as session:
        jobs.record_metrics(session=session, job_id=job.id, lease_token=claimed.lease_token, records=records)
    finish(sessions, claimed)
    return job.id


def test_it_waits_for_nobody_who_changes_the_teacher(postgres_url: str, settings: Settings, tmp_path: Path) -> None:
    write_table(tmp_path)
    impatient = settings.model_copy(update={"database_url": f"{postgres_url}&options=-clock_timeout%3D500"})
    with local_client(create_app(impatient)) as client:
        sessions: Sessions = client.app.state.services.sessions  # type: ignore[attr-defined]
        teacher = create(sessions)
        with sessions.begin() as session:
            session.execute(select(Job).where(Job.id == teacher.id).with_for_update())
            answer = asked(client, recipe="clip_kd", teacher={"job": teacher.id})
    assert (answer["state_if_submitted"], answer["teacher_job_ids"]) == ("waiting", [teacher.id])


def test_parameters(client: TestClient, sessions: Sessions) -> None:
    teacher = client.post("/jobs", json=spec_dict(student={"config": CONFIG})).json()
    hugging_face = {"config": {**CONFIG, "text_cfg": {"hf_model_name": "roberta-base"}}, "pretrained": "t.safetensors"}
    answer = asked(client, recipe="clip_kd", teacher={"job": teacher["id"]})
    student, of_job = answer["models"]
    assert student == {
        "field": "student",
        "image_parameters": IMAGE_PARAMETERS,
        "text_parameters": TEXT_PARAMETERS,
        "other_parameters": 1,
        "total_parameters": IMAGE_PARAMETERS + TEXT_PARAMETERS + 1,
        "reason": None,
    }
    assert of_job == {**student, "field": "teacher"}
    assert answer["memory"]["optimizer_bytes"] == 8 * (student["total_parameters"] + 1)  # with icl's scale

    Path(teacher["spec"]["data"]["train"][0]["path"]).with_name("t.safetensors").write_bytes(b"weights")
    answer = asked(client, recipe="clip_kd", teacher=None, teachers=[{"model": "ViT-B/16", "pretrained": "openai"}, hugging_face])
    _, known, unknown = answer["models"]
    assert (known["field"], known["total_parameters"]) == ("teachers.0", 149_620_737)
    assert (unknown["field"], unknown["total_parameters"]) == ("teachers.1", None)
    assert "Hugging Face's `roberta-base`" in unknown["reason"]
    assert [value for name, value in answer["memory"].items() if name.endswith("_bytes")] == [None] * 7
    assert "`teachers.1`" in answer["memory"]["reason"]


def test_models_in_folders(client: TestClient, sessions: Sessions, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "open_clip_model.safetensors").write_bytes(b"weights")
    config = folder / "open_clip_config.json"
    for content, reason in (
        (json.dumps({"model_cfg": CONFIG}), None),
        ("[]", "can't be read"),
        (json.dumps({"model_cfg": {**CONFIG, "text_cfg": {"heads": 0}}}), "must be above 0"),
        (json.dumps({"model_cfg": {**CONFIG, "vision_cfg": {"mlp_ratio": 1e308, "width": 1024}}}), "no model can have"),
    ):
        config.write_text(content)
        (model,) = asked(client, student={"model": "local-dir:model"})["models"]
        assert (model["reason"] is None) == (reason is None) == (model["total_parameters"] is not None)
        assert reason is None or reason in model["reason"]


def test_memory_is_told_as_an_estimate_with_what_it_assumes(client: TestClient, sessions: Sessions) -> None:
    memory = asked(client)["memory"]
    parts = [memory[f"{name}_bytes"] for name in ("weights", "gradients", "optimizer", "activations", "objective")]
    assert all(part > 0 for part in parts)
    assert memory["total_bytes"] == sum(parts)
    assert memory["weights_bytes"] + memory["optimizer_bytes"] < memory["least_bytes"] < memory["total_bytes"]
    assert "estimate" in memory["assumptions"][0]
    assert memory["reason"] is None


def test_time_comes_from_recorded_speeds_alone(client: TestClient, sessions: Sessions) -> None:
    nothing = asked(client)["time"]
    assert nothing["by_device"] == []
    assert nothing["reason"].endswith("number of processes has recorded its speed yet.")
    trained(sessions, 50.0, device=None)  # by a version that told no device
    trained(sessions, 70.0, training={"global_batch_size": 4, "warmup_steps": 1})
    trained(sessions, 80.0, student={"config": {**CONFIG, "embed_dim": 8}})
    trained(sessions, 90.0, resources={"num_processes": 2})
    assert asked(client)["time"] == nothing
    assert asked(client, resources={"device": "cuda"})["time"]["reason"].endswith("its speed on `resources.device` cuda yet.")

    first = trained(sessions, 1.0, 10.0, 30.0)
    second = trained(sessions, 20.0, name="another name", labels={"team": "a"}, evaluation={"every_epochs": 2})
    on_gpu = trained(sessions, 400.0, device="NVIDIA H100 80GB HBM3")
    time = asked(client)["time"]
    assert time["reason"] is None
    assert time["by_device"] == [
        {
            "device": device,
            "samples_per_second": speeds[0],
            "slowest_samples_per_second": speeds[1],
            "fastest_samples_per_second": speeds[2],
            "training_seconds": 32 * 4 / speeds[0],  # all epochs of four pairs
            "job_ids": job_ids,
        }
        for device, speeds, job_ids in (
            ("NVIDIA H100 80GB HBM3", (400.0, 400.0, 400.0), [on_gpu]),
            ("cpu", (15.0, 10.0, 20.0), [second, first]),
        )
    ]
    assert "evaluations" in time["assumptions"][0]
    for device, expected in (("cpu", ["cpu"]), ("cuda", ["NVIDIA H100 80GB HBM3"])):
        assert [one["device"] for one in asked(client, resources={"device": device})["time"]["by_device"]] == expected


def test_files_that_were_found(client: TestClient, sessions: Sessions, tmp_path: Path) -> None:
    for index in range(3):
        write_tar(tmp_path / f"{index}.tar", 4)
    (tmp_path / "start.safetensors").write_bytes(b"12345")
    train = [{"type": "webdataset", "shards": "{0..2}.tar"}, {"type": "csv", "path": "pairs.tsv"}]
    answer = asked(client, data={"train": train}, student={"config": CONFIG, "pretrained": "start.safetensors"})
    num_bytes = [sum((tmp_path / f"{index}.tar").stat().st_size for index in range(3)), (tmp_path / "pairs.tsv").stat().st_size]
    assert answer["files"] == [
        {"field": "student.pretrained", "num_files": 1, "num_bytes": 5, "first": f"{tmp_path}/start.safetensors"},
        {"field": "data.train.0.shards", "num_files": 3, "num_bytes": num_bytes[0], "first": f"{tmp_path}/0.tar"},
        {"field": "data.train.1.path", "num_files": 1, "num_bytes": num_bytes[1], "first": f"{tmp_path}/pairs.tsv"},
    ]


def test_a_dry_run_looks_at_nothing_that_a_job_may_not_read(client: TestClient, sessions: Sessions, tmp_path_factory: Any) -> None:
    outside = tmp_path_factory.mktemp("outside") / "secret.tsv"
    outside.write_text("filepath\ttitle\na.png\tb\n")
    spec = spec_dict(data={"train": [{"type": "csv", "path": str(outside)}]})
    response = client.post("/jobs", params={"dry_run": True}, json=spec)
    assert response.status_code == 422
    assert "outside the folders that jobs may read" in response.text


def test_a_job_that_no_worker_would_take_is_warned_of(client: TestClient, sessions: Sessions) -> None:
    (warning,) = asked(client)["warnings"]
    assert "no worker takes queue 'default'" in warning
    assert "`resources.queue`" in warning
    report(sessions, "one", problems=["broker: away"])
    (warning,) = asked(client)["warnings"]
    assert "no worker takes queue 'default' now" in warning
    report(sessions, "one")
    assert asked(client)["warnings"] == []
    (warning,) = asked(client, resources={"queue": "h100"})["warnings"]
    assert "no worker takes queue 'h100'" in warning


def test_a_job_for_gpus_of_a_queue_without_any_is_warned_of(client: TestClient, sessions: Sessions) -> None:
    on_cuda = {"resources": {"device": "cuda"}}
    report(sessions, "elsewhere", queues=["other"], gpus=[gpu()])
    report(sessions, "one")
    (warning,) = asked(client, **on_cuda)["warnings"]
    assert "no worker of queue 'default' reports a GPU" in warning
    assert asked(client)["warnings"] == []
    report(sessions, "two", gpus=[gpu()])
    assert asked(client, **on_cuda)["warnings"] == []


def test_a_job_that_surely_does_not_fit_any_gpu_is_warned_of(client: TestClient, sessions: Sessions) -> None:
    small = replace(gpu(), name="NVIDIA T4", memory_total_bytes=2**19)
    needed = asked(client)["memory"]["least_bytes"]
    assert needed > 2**19
    on_cuda = {"resources": {"device": "cuda"}}
    assert not any("GiB" in warning for warning in asked(client, **on_cuda)["warnings"]), "no worker tells of any GPU"
    report(sessions, "elsewhere", queues=["other"], gpus=[gpu()])
    report(sessions, "one", gpus=[small, replace(small, memory_total_bytes=2**18)])
    (warning,) = asked(client, **on_cuda)["warnings"]
    assert f"at least {needed / 2**30:.1f} GiB" in warning
    assert "NVIDIA T4" in warning
    assert "`training.micro_batch_size`" in warning
    assert len(asked(client)["warnings"]) == 1
    assert asked(client, resources={"device": "cpu"})["warnings"] == []
    assert asked(client, resources={"device": "cuda", "queue": "other"})["warnings"] == []
    report(sessions, "two", gpus=[])
    assert asked(client)["warnings"] == [], "it may come to a worker without GPUs"
    report(sessions, "three", gpus=[replace(small, memory_total_bytes=None)])
    assert asked(client, **on_cuda)["warnings"] == [], "how large that one is isn't known"
