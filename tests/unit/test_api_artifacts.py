"""Artifacts over the API: lists, bytes, ranges, validators."""

from __future__ import annotations

import base64
import hashlib
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from cliprd_core.spec import JobSpec
from service.settings import Settings
from service.store import artifacts
from service.store.blobs import BlobStore
from service.store.kinds import ArtifactKind
from service.store.models import Artifact
from service.store.session import make_engine, make_sessions
from tests.store_helpers import claim, create, spec_dict

CONTENT = bytes(range(256)) * 8


@pytest.fixture
def artifact(client: TestClient, settings: Settings, tmp_path: Path) -> Iterator[Artifact]:
    """A model file of a running job."""
    engine = make_engine(settings.database_url)
    sessions = make_sessions(engine)
    claimed = claim(sessions, create(sessions, JobSpec.model_validate(spec_dict())).id)
    (tmp_path / "source").write_bytes(CONTENT)
    with sessions.begin() as session:
        (registered,) = artifacts.register_artifacts(
            session=session,
            job_id=claimed.job.id,
            lease_token=claimed.lease_token,
            kind=ArtifactKind.MODEL,
            group="export",
            files={"modèle 1.safetensors": BlobStore(settings.artifacts_root).put_file(tmp_path / "source")},
        )
    yield registered
    engine.dispose()


@pytest.fixture
def href(artifact: Artifact) -> str:
    return f"/artifacts/{artifact.id}"


def etag() -> str:
    return f'"{hashlib.sha256(CONTENT).hexdigest()}"'


def problem(response: Any, status: int) -> dict[str, Any]:
    assert response.status_code == status
    assert response.headers["content-type"] == "application/problem+json"
    body: dict[str, Any] = response.json()
    assert body["status"] == status
    return body


def test_lists(client: TestClient, artifact: Artifact, href: str) -> None:
    expected = {
        "id": artifact.id,
        "job_id": artifact.job_id,
        "kind": "model",
        "group": "export",
        "step": None,
        "name": "modèle 1.safetensors",
        "num_bytes": len(CONTENT),
        "sha256": hashlib.sha256(CONTENT).hexdigest(),
        "media_type": "application/octet-stream",
        "href": href,
    }
    for path in (f"/jobs/{artifact.job_id}/artifacts", f"/artifacts?job_id={artifact.job_id}", "/artifacts?kind=model", "/artifacts"):
        body = client.get(path).json()
        (found,) = body["artifacts"]
        assert found.pop("created_at")
        assert found == expected
        assert body["next_cursor"] is None
    assert client.get("/artifacts?job_id=00000000-none").json()["artifacts"] == []
    assert client.get("/artifacts?kind=checkpoint").json()["artifacts"] == []
    assert problem(client.get("/artifacts?job_id=%00"), 422)["errors"][0]["field"] == "job_id"


def test_the_bytes_come_with_their_hash_length_and_name(client: TestClient, href: str) -> None:
    response = client.get(href)
    assert response.status_code == 200
    assert response.content == CONTENT
    assert response.headers["etag"] == etag()
    assert response.headers["content-length"] == str(len(CONTENT))
    assert response.headers["accept-ranges"] == "bytes"
    assert response.headers["content-disposition"] == "attachment; filename*=utf-8''mod%C3%A8le%201.safetensors"


def test_head_is_get_without_the_bytes(client: TestClient, href: str) -> None:
    head, get = client.head(href), client.get(href)
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers == get.headers


@pytest.mark.parametrize("given", [etag(), f'"other", W/{etag()}', "*"])
def test_bytes_that_the_client_has_are_not_sent_again(client: TestClient, href: str, given: str) -> None:
    response = client.get(href, headers={"If-None-Match": given})
    assert (response.status_code, response.content) == (304, b"")
    assert response.headers["etag"] == etag()


@pytest.mark.parametrize(
    ("given", "status"), [(etag(), 200), (f'"other", {etag()}', 200), ("*", 200), ('"other"', 412), (f"W/{etag()}", 412)]
)
def test_only_the_wanted_bytes_are_sent(client: TestClient, href: str, given: str, status: int) -> None:
    response = client.get(href, headers={"If-Match": given})
    assert response.status_code == status
    assert response.headers["etag"] == etag()
    if status == 412:
        assert etag() in problem(response, 412)["detail"]


def test_other_bytes_are_sent(client: TestClient, href: str) -> None:
    assert client.get(href, headers={"If-None-Match": '"other"'}).content == CONTENT


def test_a_broken_download_is_continued(client: TestClient, href: str) -> None:
    response = client.get(href, headers={"Range": "bytes=2000-", "If-Range": etag()})
    assert response.status_code == 206
    assert response.content == CONTENT[2000:]
    assert response.headers["content-range"] == f"bytes 2000-{len(CONTENT) - 1}/{len(CONTENT)}"
    assert client.get(href, headers={"Range": "bytes=2000-", "If-Range": '"other"'}).content == CONTENT


def test_a_range_outside_the_file_is_a_problem(client: TestClient, href: str) -> None:
    response = client.get(href, headers={"Range": "bytes=9999-"})
    problem(response, 416)
    assert response.headers["content-range"] == f"bytes */{len(CONTENT)}"


@pytest.mark.parametrize("artifact_id", ["00000000-none", "..%2F..%2Fetc%2Fpasswd", "%00"])
def test_what_is_no_artifact(client: TestClient, artifact_id: str) -> None:
    problem(client.get(f"/artifacts/{artifact_id}"), 404)


def test_lost_bytes_are_a_404_that_the_log_explains(
    client: TestClient, settings: Settings, artifact: Artifact, href: str, caplog: pytest.LogCaptureFixture
) -> None:
    BlobStore(settings.artifacts_root).delete(artifact.storage_key)
    problem(client.get(href), 404)
    assert "has lost its bytes" in caplog.text


def test_bytes_that_were_cut_off_are_lost(client: TestClient, settings: Settings, artifact: Artifact, href: str) -> None:
    BlobStore(settings.artifacts_root).path(artifact.storage_key).write_bytes(CONTENT[:-1])
    problem(client.get(href), 404)
    assert client.head(href).status_code == 404


def test_the_hash_comes_as_a_digest_of_the_whole_also_with_a_part(client: TestClient, href: str) -> None:
    digest = f"sha-256=:{base64.b64encode(hashlib.sha256(CONTENT).digest()).decode()}:"
    assert client.get(href).headers["repr-digest"] == digest
    part = client.get(href, headers={"Range": "bytes=0-9"})
    assert (part.status_code, part.headers["repr-digest"], part.headers["content-length"]) == (206, digest, "10")


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        ("bytes=0-0", slice(0, 1)),
        ("bytes=5-", slice(5, None)),
        ("BYTES = 5 - 9", slice(5, 10)),
        ("bytes=-7", slice(-7, None)),
        ("bytes=-999999", slice(None)),
        ("bytes=5-999999", slice(5, None)),
    ],
)
def test_ranges(client: TestClient, href: str, header: str, expected: slice) -> None:
    response = client.get(href, headers={"Range": header})
    assert (response.status_code, response.content) == (206, CONTENT[expected])
    assert response.headers["content-length"] == str(len(CONTENT[expected]))


@pytest.mark.parametrize("header", ["bytes=", "bytes=-", "bytes=9-5", "bytes=0-1,5-6", "lines=1-2", "bytes=a-b", "bytes=" + "9" * 40 + "-"])
def test_headers_that_are_no_single_range_are_ignored(client: TestClient, href: str, header: str) -> None:
    response = client.get(href, headers={"Range": header})
    assert (response.status_code, response.content) == (200, CONTENT)


@pytest.mark.parametrize("header", [f"bytes={len(CONTENT)}-", "bytes=-0"])
def test_ranges_behind_the_end(client: TestClient, href: str, header: str) -> None:
    problem(client.get(href, headers={"Range": header}), 416)


def test_a_silent_store_holds_up_downloads_alone(client: TestClient, href: str, monkeypatch: pytest.MonkeyPatch) -> None:
    num_downloads = 50  # more than there are threads for all that a request may wait for
    answered = threading.Event()
    ask = BlobStore.num_bytes

    def ask_in_vain(store: BlobStore, key: str) -> int:
        answered.wait(60)
        return ask(store, key)

    monkeypatch.setattr(BlobStore, "num_bytes", ask_in_vain)
    with ThreadPoolExecutor(num_downloads + 1) as pool:
        downloads = [pool.submit(client.get, href) for _ in range(num_downloads)]
        try:
            time.sleep(0.5)  # most of them wait by now
            assert pool.submit(client.get, "/jobs").result(30).status_code == 200
            assert not any(one.done() for one in downloads)
        finally:
            answered.set()
        assert all(one.result(30).content == CONTENT for one in downloads)
