"""Artifacts in S3, against moto's server: stored, verified, streamed by the API in whole and in part; and without the store."""

from __future__ import annotations

import hashlib
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from botocore.exceptions import ClientError
from fastapi.testclient import TestClient

from service.app import create_app
from service.settings import Settings
from service.store import artifacts, s3_blobs
from service.store.blobs import Blobs, BlobsRefusedError, BlobsUnreachableError, make_blobs, new_key
from service.store.kinds import ArtifactKind
from service.store.models import Artifact
from service.store.s3_blobs import S3BlobStore
from tests.store_helpers import claim, create, local_client

CONTENT = bytes(range(256)) * 50_000  # 12.8 MB: uploaded in parts


@pytest.fixture
def s3(s3_client: Any, patient_readiness: None, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A client of an empty bucket; the store finds the server as any AWS tool does."""
    monkeypatch.setattr(s3_blobs, "NUM_TRIES", 1)
    client = s3_client
    client.create_bucket(Bucket="models")
    yield client
    for one in client.list_objects_v2(Bucket="models").get("Contents", []):
        client.delete_object(Bucket="models", Key=one["Key"])


@pytest.fixture
def blobs(s3: Any) -> Blobs:
    return make_blobs("s3://models/some/prefix/", Path("unused"))


def keys(s3: Any) -> list[str]:
    return [one["Key"] for one in s3.list_objects_v2(Bucket="models").get("Contents", [])]


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def test_bytes_come_back_as_they_went_in(s3: Any, blobs: Blobs, tmp_path: Path) -> None:
    stored = blobs.put_file(write(tmp_path / "source", CONTENT))
    assert (stored.num_bytes, stored.sha256) == (len(CONTENT), hashlib.sha256(CONTENT).hexdigest())
    assert keys(s3) == [f"some/prefix/{stored.key}"]
    assert blobs.num_bytes(stored.key) == len(CONTENT)
    assert b"".join(blobs.stream(stored.key)) == CONTENT
    assert b"".join(blobs.stream(stored.key, 1000, 3_000_000)) == CONTENT[1000:3_001_000]
    assert b"".join(blobs.stream(stored.key, 1000)) == CONTENT[1000:]
    assert b"".join(blobs.stream(stored.key, 5, 0)) == b""
    for _ in range(2):
        blobs.delete(stored.key)
    assert keys(s3) == []
    for missing in (blobs.num_bytes, blobs.stream):
        with pytest.raises(FileNotFoundError):
            missing(stored.key)
    empty = blobs.put_file(write(tmp_path / "empty", b""))
    assert b"".join(blobs.stream(empty.key)) == b""


def test_deleting_takes_what_a_killed_upload_left(s3: Any, blobs: Blobs) -> None:
    key, other = new_key(), new_key()
    for one in (key, other):
        begun = s3.create_multipart_upload(Bucket="models", Key=f"some/prefix/{one}")
        s3.upload_part(Bucket="models", Key=f"some/prefix/{one}", UploadId=begun["UploadId"], PartNumber=1, Body=b"half")
    blobs.delete(key)
    assert [one["Key"] for one in s3.list_multipart_uploads(Bucket="models")["Uploads"]] == [f"some/prefix/{other}"]


def test_an_identity_that_may_not_list_uploads_deletes_all_the_same(blobs: S3BlobStore, s3: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**_: object) -> None:
        raise ClientError({"Error": {"Code": "AccessDenied", "Message": "no"}}, "ListMultipartUploads")

    s3.put_object(Bucket="models", Key=f"some/prefix/{(key := new_key())}", Body=b"x")
    monkeypatch.setattr(blobs._client, "list_multipart_uploads", refuse)
    blobs.delete(key)
    assert keys(s3) == []


def test_a_file_that_changes_while_it_is_uploaded_is_not_stored(
    s3: Any, blobs: Blobs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write(tmp_path / "source", b"first")
    real = hashlib.file_digest

    def changed(file: Any, name: str) -> Any:
        digest = real(file, name)
        source.write_bytes(b"changed")
        return digest

    monkeypatch.setattr(hashlib, "file_digest", changed)
    with pytest.raises(OSError, match="changed while"):
        blobs.put_file(source)
    assert keys(s3) == []


def test_a_refusal_says_what_to_do(blobs: Blobs, tmp_path: Path) -> None:
    blobs.check_writable()
    nowhere = S3BlobStore("s3://no-such-bucket")
    for act in (nowhere.check_writable, lambda: nowhere.put_file(write(tmp_path / "source", b"x")), lambda: nowhere.stream(new_key())):
        with pytest.raises(BlobsRefusedError, match=r"no-such-bucket: .*NoSuchBucket.* Make the bucket, or correct `CLIPRD_ARTIFACTS_URL`"):
            act()


def test_a_store_that_says_nothing_is_soon_given_up_where_that_is_wanted(s3_client: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3_blobs, "QUICK_READ_TIMEOUT_SECONDS", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent, ThreadPoolExecutor(1) as pool:  # the kernel accepts for it
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{silent.getsockname()[1]}")
        quick = make_blobs("s3://models", Path("unused"), is_quick=True)
        with pytest.raises(BlobsUnreachableError, match="Read timeout"):
            pool.submit(quick.delete, new_key()).result(timeout=60)


@pytest.mark.parametrize(
    ("code", "remedy"),
    [("AccessDenied", "Allow the worker's"), ("403", "Allow the worker's"), ("InvalidAccessKeyId", "credentials"), ("SlowDown", None)],
)
def test_a_refusal_is_told_from_a_failure(
    blobs: S3BlobStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str, remedy: str | None
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ClientError({"Error": {"Code": code, "Message": "no"}}, "Operation")

    for operation in ("put_object", "head_object"):
        monkeypatch.setattr(blobs._client, operation, fail)
    source = write(tmp_path / "source", b"x")
    for act in (lambda: blobs.put_file(source), lambda: blobs.num_bytes(new_key()), blobs.check_writable):
        with pytest.raises(BlobsUnreachableError, match=code) as caught:
            act()
        assert isinstance(caught.value, BlobsRefusedError) == (remedy is not None)
        assert remedy is None or remedy in str(caught.value)


def test_no_credentials_are_a_refusal(blobs: Blobs, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    with pytest.raises(BlobsRefusedError, match="credentials"):
        blobs.check_writable()


def test_a_store_out_of_reach_is_no_refusal(blobs: Blobs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    with pytest.raises(BlobsUnreachableError) as caught:
        blobs.check_writable()
    assert not isinstance(caught.value, BlobsRefusedError)


@pytest.mark.parametrize("url", ["s3://", "http://bucket/x", "bucket", "s3://bucket/x?y=1"])
def test_addresses_that_are_none(url: str) -> None:
    with pytest.raises(ValueError, match="CLIPRD_ARTIFACTS_URL"):
        make_blobs(url, Path())


def test_only_keys_of_its_own_making_are_objects(blobs: Blobs) -> None:
    for act in (blobs.stream, blobs.delete, blobs.num_bytes):
        with pytest.raises(ValueError, match="no key"):
            act("../other")


@pytest.fixture
def client(s3: Any, settings: Settings) -> Iterator[TestClient]:
    with local_client(create_app(settings.model_copy(update={"artifacts_url": "s3://models"})), raise_server_exceptions=False) as client:
        yield client


@pytest.fixture
def artifact(client: TestClient, tmp_path: Path) -> Artifact:
    services = client.app.state.services  # type: ignore[attr-defined]
    claimed = claim(services.sessions, create(services.sessions).id)
    with services.sessions.begin() as session:
        (artifact,) = artifacts.register_artifacts(
            session=session,
            job_id=claimed.job.id,
            lease_token=claimed.lease_token,
            kind=ArtifactKind.MODEL,
            group="export",
            files={"model.safetensors": services.blobs.put_file(write(tmp_path / "source", CONTENT))},
        )
    return artifact


def test_the_api_streams_it_in_whole_and_in_part(client: TestClient, artifact: Artifact) -> None:
    href = f"/artifacts/{artifact.id}"
    whole = client.get(href)
    assert whole.content == CONTENT
    assert whole.headers["etag"] == f'"{hashlib.sha256(CONTENT).hexdigest()}"'
    part = client.get(href, headers={"Range": "bytes=100-2000099", "If-Range": whole.headers["etag"]})
    assert (part.status_code, part.content) == (206, CONTENT[100:2_000_100])
    assert client.head(href).headers["content-length"] == str(len(CONTENT))
    assert client.get("/readyz").status_code == 200


def test_the_api_tells_a_store_that_is_away_from_bytes_that_are_gone(
    client: TestClient, artifact: Artifact, s3: Any, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    href = f"/artifacts/{artifact.id}"
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    with local_client(create_app(settings.model_copy(update={"artifacts_url": "s3://models"}))) as other:
        response = other.get(href)
        assert (response.status_code, response.headers["retry-after"]) == (503, "5")
        assert [one["field"] for one in other.get("/readyz").json()["errors"]] == ["artifacts_root"]
    s3.delete_object(Bucket="models", Key=artifact.storage_key)
    assert client.get(href).status_code == 404
