"""Artifacts: lists of them, and their bytes."""

from __future__ import annotations

import logging
from base64 import b64encode
from collections.abc import AsyncIterator, Iterator
from typing import Annotated
from urllib.parse import quote

from anyio import CapacityLimiter, to_thread
from fastapi import APIRouter, Header, HTTPException, Query, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import Response, StreamingResponse

from cliprd_core.spec import JOB_ID_PATTERN
from service.byte_ranges import requested_range
from service.errors import problem_responses
from service.routes.dependencies import ArtifactIdInPath, Cursor, Limit, RootPath, ServicesOf
from service.schemas import ArtifactList
from service.store import artifacts
from service.store.blobs import Blobs
from service.store.errors import ArtifactNotFoundError
from service.store.kinds import ArtifactKind
from service.store.models import Artifact
from service.store.session import reading
from service.strict_query import StrictRoute

logger = logging.getLogger(__name__)

router = APIRouter(prefix="/artifacts", tags=["artifacts"], route_class=StrictRoute)

_BYTES = {"content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}}


@router.get("", summary="List artifacts, newest first", responses=problem_responses(500, 503))
def list_artifacts(
    *,
    services: ServicesOf,
    root_path: RootPath,
    job_id: Annotated[str | None, Query(pattern=JOB_ID_PATTERN, description="Only artifacts of this job.")] = None,
    kind: Annotated[ArtifactKind | None, Query(description="Only artifacts of this kind.")] = None,
    limit: Limit = 50,
    cursor: Cursor = None,
) -> ArtifactList:
    """A page of artifacts."""
    with reading(services.sessions) as session:
        page = artifacts.list_artifacts(session=session, job_id=job_id, kind=kind, limit=limit, cursor=cursor)
    return ArtifactList.of(page.rows, page.next_cursor, root_path)


@router.head("/{artifact_id}", include_in_schema=False)
@router.get(
    "/{artifact_id}",
    summary="Download an artifact",
    response_class=StreamingResponse,
    responses={
        200: {"description": "The bytes", **_BYTES},
        206: {"description": "The requested range of the bytes", **_BYTES},
        304: {"description": "The bytes are those of If-None-Match"},
        **problem_responses(400, 404, 412, 416, 500, 503),
    },
)
async def download_artifact(
    *,
    request: Request,
    services: ServicesOf,
    artifact_id: ArtifactIdInPath,
    range_: Annotated[str | None, Header(alias="Range", description="`bytes=FIRST-LAST`, as in RFC 9110; one range.")] = None,
    if_range: Annotated[
        str | None, Header(alias="If-Range", description="ETag of the bytes that the range is of; if others are here now, all come.")
    ] = None,
    if_match: Annotated[
        str | None, Header(alias="If-Match", description="ETags of the bytes that are wanted; if others are here now, none come (412).")
    ] = None,
    if_none_match: Annotated[str | None, Header(alias="If-None-Match", description="ETags that the client has already.")] = None,
) -> Response:
    """The bytes. ETag and Repr-Digest are their SHA-256; HEAD and ranges work, so a broken download can be continued."""

    def read() -> Artifact:
        with reading(services.sessions) as session:
            return artifacts.get_artifact(session=session, artifact_id=artifact_id)

    artifact = await run_in_threadpool(read)
    etag = f'"{artifact.sha256}"'
    digest = b64encode(bytes.fromhex(artifact.sha256)).decode()
    headers = {
        **{"ETag": etag, "Repr-Digest": f"sha-256=:{digest}:"},
        **{"Accept-Ranges": "bytes", "Cache-Control": "no-cache"},
    }
    if if_match is not None and not _matches(etag, if_match, is_weak=False):
        raise HTTPException(412, f"the ETag of the artifact is {etag}, which If-Match does not name", headers={"ETag": etag})
    if if_none_match is not None and _matches(etag, if_none_match):
        return Response(status_code=304, headers=headers)
    part = requested_range(range_, if_range, etag=etag, size=artifact.num_bytes)
    start, num_bytes = (0, artifact.num_bytes) if part is None else (part.start, part.num_bytes)
    headers |= {"Content-Length": str(num_bytes), "Content-Disposition": _disposition(artifact.name)}
    if part is not None:
        headers["Content-Range"] = part.content_range
    try:
        num_read = num_bytes if request.method == "GET" else 0
        content = await to_thread.run_sync(_stream, services.blobs, artifact, start, num_read, limiter=services.downloads)
    except FileNotFoundError as error:
        logger.error("artifact %s has lost its bytes, or some, under %s", artifact.id, artifact.storage_key)  # noqa: TRY400  (no fault of ours)
        raise ArtifactNotFoundError(artifact_id) from error
    return StreamingResponse(_sent(content, services.downloads), 200 if part is None else 206, headers, media_type=artifact.media_type)


async def _sent(content: Iterator[bytes], threads: CapacityLimiter) -> AsyncIterator[bytes]:
    """As they are read, in threads that nothing else waits for."""
    while (chunk := await to_thread.run_sync(next, content, None, limiter=threads)) is not None:
        yield chunk


def _stream(blobs: Blobs, artifact: Artifact, start: int, num_bytes: int) -> Iterator[bytes]:
    """
    Raises:
        FileNotFoundError: the bytes are gone, or cut off.
    """
    if blobs.num_bytes(artifact.storage_key) != artifact.num_bytes:
        raise FileNotFoundError(artifact.storage_key)
    return blobs.stream(artifact.storage_key, start, num_bytes)


def _disposition(name: str) -> str:
    """RFC 6266: names beyond plain ASCII need the extended form."""
    quoted = quote(name)
    return f'attachment; filename="{name}"' if quoted == name else f"attachment; filename*=utf-8''{quoted}"


def _matches(etag: str, given: str, *, is_weak: bool = True) -> bool:
    """RFC 9110, section 8.8.3.2: comparison with each of the tags, weak as of If-None-Match or strong as of If-Match, or `*`."""
    tags = [tag.strip() for tag in given.split(",")]
    return "*" in tags or etag in tags or (is_weak and f"W/{etag}" in tags)
