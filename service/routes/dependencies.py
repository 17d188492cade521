"""What the routes share: the services of their app, and the shapes of ids and pages."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated

from anyio import CapacityLimiter
from fastapi import Depends, Path, Query, Request
from prometheus_client import CollectorRegistry
from sqlalchemy import Engine
from sqlalchemy.orm import Session, sessionmaker

from service.intake import Intake
from service.messages import Messages
from service.preparation import Preparation
from service.queue import JobQueue
from service.readiness import Readiness
from service.settings import Settings
from service.store.blobs import Blobs
from service.store.errors import ArtifactNotFoundError, JobNotFoundError
from service.streams import Streams

_ID = re.compile(r"[0-9a-z-]{8,64}")


@dataclass(frozen=True)
class Services:
    """Everything a route may need; one per app."""

    settings: Settings
    engine: Engine
    sessions: sessionmaker[Session]
    blobs: Blobs
    queue: JobQueue
    preparation: Preparation
    intake: Intake
    messages: Messages
    streams: Streams
    readiness: Readiness
    registry: CollectorRegistry
    """What `/metrics` tells."""
    downloads: CapacityLimiter
    """Of threads that read artifacts' bytes, which a silent store may hold."""
    file_looks: CapacityLimiter
    """Of threads that look at the files of specs, which a slow file server may hold; the submissions' own are in `preparation`."""


def services_of(request: Request) -> Services:
    """Those of the app that serves the request."""
    services: Services = request.app.state.services
    return services


def root_path_of(request: Request) -> str:
    """Where a proxy has mounted the API."""
    return str(request.scope.get("root_path", ""))


async def _services(request: Request) -> Services:
    return services_of(request)


async def _root_path(request: Request) -> str:
    return root_path_of(request)


async def _job_id(job_id: Annotated[str, Path(description="Id of the job.")]) -> str:
    """What can't be an id is the id of nothing, and is not worth a question to the database."""
    if not _ID.fullmatch(job_id):
        raise JobNotFoundError(job_id)
    return job_id


async def _artifact_id(artifact_id: Annotated[str, Path(description="Id of the artifact.")]) -> str:
    if not _ID.fullmatch(artifact_id):
        raise ArtifactNotFoundError(artifact_id)
    return artifact_id


ServicesOf = Annotated[Services, Depends(_services)]
RootPath = Annotated[str, Depends(_root_path)]
"""Where a proxy has mounted the API, for links."""
JobIdInPath = Annotated[str, Depends(_job_id)]
ArtifactIdInPath = Annotated[str, Depends(_artifact_id)]
Limit = Annotated[int, Query(ge=1, le=200, description="Rows of one page, at most.")]
Cursor = Annotated[str | None, Query(max_length=512, description="`next_cursor` of the page before. Left out: the first page.")]
