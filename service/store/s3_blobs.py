"""The bytes of artifacts in S3, or in any store that speaks its protocol. Needs the extra `s3`.

Credentials, region and endpoint come from where every AWS tool looks (`AWS_…` variables, profiles, instance roles).
"""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from service.store.blobs import CHUNK_BYTES, BlobsRefusedError, BlobsUnreachableError, StoredBlob, check_key, new_key

CONNECT_TIMEOUT_SECONDS = 10
READ_TIMEOUT_SECONDS = 60
NUM_TRIES = 5

QUICK_CONNECT_TIMEOUT_SECONDS = 3
QUICK_READ_TIMEOUT_SECONDS = 5
QUICK_TRIES = 2
_MISSING = frozenset({"404", "NoSuchKey"})
_RIGHTS = "Allow the worker's and the API's identity to read, write and delete objects there"
_CREDENTIALS = "Give the worker and the API valid credentials (`AWS_…` variables, a profile or an instance's role)"
_BUCKET = "Make the bucket, or correct `CLIPRD_ARTIFACTS_URL`"
_REGION = "Correct `AWS_REGION` or `AWS_ENDPOINT_URL`, or the bucket in `CLIPRD_ARTIFACTS_URL`"
WHAT_TO_DO = {
    **dict.fromkeys(("403", "AccessDenied", "AllAccessDisabled", "AccountProblem", "NotSignedUp"), _RIGHTS),
    **dict.fromkeys(
        ("InvalidAccessKeyId", "SignatureDoesNotMatch", "InvalidToken", "ExpiredToken", "InvalidSecurity", "TokenRefreshRequired"),
        _CREDENTIALS,
    ),
    **dict.fromkeys(("NoSuchBucket", "InvalidBucketName"), _BUCKET),
    **dict.fromkeys(("301", "PermanentRedirect", "AuthorizationHeaderMalformed", "IllegalLocationConstraintException"), _REGION),
}
"""For each code of S3's that says the same at every try, until somebody does this."""


class S3BlobStore:
    """Objects below `s3://BUCKET/PREFIX`, named by keys that the store makes up itself.

    A put is atomic in S3, also one in several parts, and S3 compares every part with the SHA-256 that is sent along.

    Args:
        url: `s3://BUCKET/PREFIX`.
        is_quick: Whether a server that says nothing is given up after some 15 seconds, and not after minutes: for what is tried again
            anyway. Its client is made at once, since a child that was forked while it is made could never make one.

    Raises:
        ValueError: `url` is something else, or the extra `s3` is not installed.
    """

    def __init__(self, url: str, *, is_quick: bool = False) -> None:
        parts = urlsplit(url)
        if parts.scheme != "s3" or not parts.netloc or parts.query or parts.fragment:
            raise ValueError(f"artifacts_url: {url!r} is not s3://BUCKET/PREFIX; correct CLIPRD_ARTIFACTS_URL")
        try:
            import boto3  # noqa: F401
        except ImportError as error:
            raise ValueError("artifacts_url: S3 needs the package boto3; `pip install 'cliprd[s3]'`") from error
        self._bucket = parts.netloc
        self._prefix = parts.path.strip("/")
        self._is_quick = is_quick
        if is_quick:
            _ = self._client

    @cached_property
    def _client(self) -> Any:
        import boto3
        from botocore.config import Config

        connect, read, num_tries = CONNECT_TIMEOUT_SECONDS, READ_TIMEOUT_SECONDS, NUM_TRIES
        if self._is_quick:
            connect, read, num_tries = QUICK_CONNECT_TIMEOUT_SECONDS, QUICK_READ_TIMEOUT_SECONDS, QUICK_TRIES
        retries = {"mode": "standard", "total_max_attempts": num_tries}
        config = Config(retries=retries, connect_timeout=connect, read_timeout=read)
        return boto3.session.Session().client("s3", config=config)  # the module's own default session is not safe in threads

    def put_file(self, source: Path, key: str | None = None) -> StoredBlob:
        """Upload a file, as `Blobs`.

        Raises:
            OSError: the source can't be read, or changed meanwhile; BlobsUnreachableError: the store refused it.
        """
        before = source.stat()
        with source.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        blob = StoredBlob(key=key or new_key(), num_bytes=before.st_size, sha256=sha256)
        where = self._where(blob.key)
        with self._translated():
            options = {"ChecksumAlgorithm": "SHA256", "Metadata": {"sha256": sha256}}
            self._client.upload_file(str(source), where["Bucket"], where["Key"], ExtraArgs=options)
        after = source.stat()
        if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns) or self.num_bytes(blob.key) != blob.num_bytes:
            self.delete(blob.key)
            raise OSError(f"{source} changed while it was uploaded")
        return blob

    def num_bytes(self, key: str) -> int:
        """
        Raises:
            FileNotFoundError: there are no such bytes.
        """
        with self._translated():
            return int(self._client.head_object(**self._where(key))["ContentLength"])

    def stream(self, key: str, start: int = 0, num_bytes: int | None = None) -> Iterator[bytes]:
        """The bytes from `start` on, in chunks. They are asked for at once, so that what is missing is known before the first chunk.

        Raises:
            FileNotFoundError: there are no such bytes; BlobsUnreachableError: the store fails, now or on the way.
        """
        if num_bytes == 0:
            self.num_bytes(key)
            return iter(())
        end = "" if num_bytes is None else str(start + num_bytes - 1)
        asked = {} if start == 0 and num_bytes is None else {"Range": f"bytes={start}-{end}"}
        with self._translated():
            body = self._client.get_object(**self._where(key), **asked)["Body"]
        return self._chunks(body)

    def _chunks(self, body: Any) -> Iterator[bytes]:
        try:
            with self._translated():
                yield from body.iter_chunks(CHUNK_BYTES)
        finally:
            body.close()

    def delete(self, key: str) -> None:
        """As `Blobs`. Parts of an upload that was killed stay where the identity may not list or abort uploads."""
        where = self._where(key)
        with self._translated():
            self._client.delete_object(**where)
        with suppress(BlobsRefusedError), self._translated():
            begun = self._client.list_multipart_uploads(Bucket=where["Bucket"], Prefix=where["Key"]).get("Uploads", [])
            for upload in begun:
                self._client.abort_multipart_upload(**where, UploadId=upload["UploadId"])

    def check_writable(self) -> None:
        """Raises:
        OSError: nothing can be written there.
        """
        probe = {"Bucket": self._bucket, "Key": self._below(f".probe-{uuid.uuid4().hex}")}
        with self._translated():
            self._client.put_object(**probe, Body=b"")
            self._client.delete_object(**probe)

    def _where(self, key: str) -> dict[str, str]:
        check_key(key)
        return {"Bucket": self._bucket, "Key": self._below(key)}

    def _below(self, name: str) -> str:
        return f"{self._prefix}/{name}" if self._prefix else name

    @contextmanager
    def _translated(self) -> Iterator[None]:
        """boto's errors as the blob stores' own."""
        from boto3.exceptions import Boto3Error
        from botocore.exceptions import BotoCoreError, ClientError

        try:
            yield
        except (ClientError, BotoCoreError, Boto3Error) as error:
            # an upload's error wraps the one that says why
            cause = error.__context__ if isinstance(error, Boto3Error) and isinstance(error.__context__, ClientError) else error
            code = cause.response.get("Error", {}).get("Code") if isinstance(cause, ClientError) else None
            if code in _MISSING:
                raise FileNotFoundError(f"s3://{self._bucket} does not hold the bytes") from error
            remedy = _CREDENTIALS if _lacks_credentials(error) else WHAT_TO_DO.get(code or "")
            if remedy is not None:
                raise BlobsRefusedError(f"s3://{self._bucket}: {error}. {remedy}.") from error
            raise BlobsUnreachableError(f"s3://{self._bucket}: {error}") from error


def _lacks_credentials(error: Exception) -> bool:
    """Whether no request was made, for want of credentials."""
    from botocore.exceptions import NoCredentialsError, PartialCredentialsError, ProfileNotFound

    return isinstance(error, NoCredentialsError | PartialCredentialsError | ProfileNotFound)
