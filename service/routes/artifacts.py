"""Artifacts: lists of them, and their bytes."""

from __future__ import annotations

import logging
from typing import Annotated

from fastapi import APIRouter, Header, Query
from fastapi.responses import FileResponse, Response

from service.errors import problem_responses
from service.routes.dependencies import ArtifactIdInPath, Cursor, Limit, RootPath, ServicesOf
from service.schemas import ArtifactList
from service.store import artifacts
from service.store.errors import ArtifactNotFoundError
from service.store.models import ArtifactKind
from service.store.session import reading

logger = logging.getLogger(__name__)

router = APIRouter(prefix="/artifacts", tags=["artifacts"])

_BYTES = {"content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}}


@router.get("", summary="List artifacts, newest first", responses=problem_responses(422, 500, 503))
def list_artifacts(
    *,
    services: ServicesOf,
    root_path: RootPath,
    job_id: Annotated[str | None, Query(pattern=r"^[0-9a-z-]{8,64}$", description="Only artifacts of this job.")] = None,
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
    response_class=FileResponse,
    responses={
        200: {"description": "The bytes", **_BYTES},
        206: {"description": "The requested range of the bytes", **_BYTES},
        304: {"description": "The bytes are those of If-None-Match"},
        **problem_responses(400, 404, 416, 500, 503),
    },
)
def download_artifact(
    services: ServicesOf,
    artifact_id: ArtifactIdInPath,
    if_none_match: Annotated[str | None, Header(description="ETags that the client has already.")] = None,
) -> Response:
    """The bytes. The ETag is their SHA-256; HEAD and ranges work, so a broken download can be continued."""
    with reading(services.sessions) as session:
        artifact = artifacts.get_artifact(session=session, artifact_id=artifact_id)
    etag = f'"{artifact.sha256}"'
    headers = {"ETag": etag, "Cache-Control": "no-cache", "X-Content-Type-Options": "nosniff"}
    if if_none_match is not None and _matches(etag, if_none_match):
        return Response(status_code=304, headers=headers)
    path = services.blobs.path(artifact.storage_key)
    if not path.is_file():
        logger.error("artifact %s has lost its bytes: there is no %s", artifact.id, path)
        raise ArtifactNotFoundError(artifact_id)
    return FileResponse(path, media_type=artifact.media_type, filename=artifact.name, headers=headers)


def _matches(etag: str, if_none_match: str) -> bool:
    """RFC 9110, section 13.1.2: weak comparison with each of the tags, or `*`."""
    tags = [tag.strip().removeprefix("W/") for tag in if_none_match.split(",")]
    return "*" in tags or etag in tags
