"""Jobs: submit, list, read, cancel, and what they measured."""

from __future__ import annotations

import re
from http import HTTPStatus
from typing import Annotated

from fastapi import APIRouter, Body, Query, Response

from cliprd_core.spec import JobSpec
from service.errors import NoSuchLabelError, problem_responses
from service.examples import EXAMPLES
from service.routes.dependencies import Cursor, JobIdInPath, Limit, RootPath, ServicesOf
from service.schemas import ArtifactList, EvaluationList, JobList, JobView, MetricsView
from service.spec_check import check_spec
from service.store import artifacts, jobs, metrics
from service.store.models import ArtifactKind
from service.store.session import reading
from service.store.states import JobState

router = APIRouter(prefix="/jobs", tags=["jobs"])

_LABEL = re.compile(r"([A-Za-z0-9_.-]{1,64})=([A-Za-z0-9_.-]{0,128})")


@router.post("", status_code=201, summary="Submit a job", responses=problem_responses(400, 413, 422, 500, 503))
def submit_job(
    services: ServicesOf, root_path: RootPath, response: Response, spec: Annotated[JobSpec, Body(openapi_examples=EXAMPLES)]
) -> JobView:
    """Check the spec, store the job, and send it to the workers of its queue. Every problem that was found is named at once."""
    settings = services.settings
    resolved = check_spec(spec, data_root=settings.data_root, locations=settings.locations, check_files=settings.check_files)
    with services.sessions.begin() as session:
        job = jobs.create_job(session=session, spec=resolved, max_attempts=settings.max_attempts)
    if job.state is JobState.QUEUED and services.queue.send(job.id, job.queue):
        with services.sessions.begin() as session:
            jobs.mark_sent(session=session, job_ids=[job.id])
    view = JobView.of(job, root_path)
    response.headers["Location"] = view.links.self
    return view


@router.get("", summary="List jobs, newest first", responses=problem_responses(422, 500, 503))
def list_jobs(
    *,
    services: ServicesOf,
    root_path: RootPath,
    state: Annotated[JobState | None, Query(description="Only jobs in this state.")] = None,
    label: Annotated[list[str], Query(max_length=16, description="`key=value`; repeat it: all must match.")] = [],  # noqa: B006
    limit: Limit = 50,
    cursor: Cursor = None,
) -> JobList:
    """A page of jobs. Pages stay stable while jobs are added."""
    with reading(services.sessions) as session:
        page = jobs.list_jobs(session=session, state=state, labels=_labels(label), limit=limit, cursor=cursor)
    return JobList(jobs=[JobView.of(job, root_path) for job in page.rows], next_cursor=page.next_cursor)


def _labels(given: list[str]) -> dict[str, str]:
    labels: dict[str, str] = {}
    for one in given:
        parts = _LABEL.fullmatch(one)
        if parts is None:
            raise NoSuchLabelError(f"`{one[:80]}` is not `key=value`, of letters, digits, `_`, `.` and `-`")
        if labels.setdefault(parts[1], parts[2]) != parts[2]:
            raise NoSuchLabelError(f"`{parts[1]}` is given twice with different values, which no job can have")
    return labels


@router.get("/{job_id}", summary="Read a job", responses=problem_responses(404, 500, 503))
def read_job(services: ServicesOf, root_path: RootPath, job_id: JobIdInPath) -> JobView:
    """State, progress, latest metrics, and error or result."""
    with reading(services.sessions) as session:
        return JobView.of(jobs.get_job(session=session, job_id=job_id), root_path)


@router.post(
    "/{job_id}/cancel",
    summary="Cancel a job",
    responses={202: {"description": "Requested; its worker stops it", "model": JobView}, **problem_responses(404, 409, 500, 503)},
)
def cancel_job(services: ServicesOf, root_path: RootPath, job_id: JobIdInPath, response: Response) -> JobView:
    """A job that hasn't started is cancelled at once (200); a running one is asked to stop (202); a finished one can't be (409)."""
    with services.sessions.begin() as session:
        job = jobs.request_cancel(session=session, job_id=job_id)
    if not job.state.is_finished:
        response.status_code = HTTPStatus.ACCEPTED
    return JobView.of(job, root_path)


@router.get("/{job_id}/metrics", summary="Metric series", responses=problem_responses(404, 422, 500, 503))
def read_metrics(
    services: ServicesOf,
    job_id: JobIdInPath,
    names: Annotated[
        list[str], Query(max_length=256, description="Names, or prefixes that end in `*`; separated by commas, or repeated.")
    ] = ["*"],  # noqa: B006
    since_step: Annotated[int, Query(ge=0, lt=2**63, description="First step of interest.")] = 0,
    max_points: Annotated[
        int, Query(ge=metrics.MIN_POINTS, le=10_000, description="Points of one series, at most; peaks and dips survive.")
    ] = 1000,
) -> MetricsView:
    """Series of what was measured while training."""
    patterns = [name.strip() for one in names for name in one.split(",")]
    with reading(services.sessions) as session:
        job = jobs.get_job(session=session, job_id=job_id)
        return MetricsView.of(metrics.series(session=session, job=job, names=patterns, since_step=since_step, max_points=max_points))


@router.get("/{job_id}/evaluations", summary="Evaluations", responses=problem_responses(404, 500, 503))
def read_evaluations(services: ServicesOf, job_id: JobIdInPath) -> EvaluationList:
    """Everything that was evaluated, by step; values are fractions 0-1."""
    with reading(services.sessions) as session:
        jobs.get_job(session=session, job_id=job_id)
        return EvaluationList(evaluations=metrics.list_evaluations(session=session, job_id=job_id))


@router.get("/{job_id}/artifacts", summary="A job's artifacts", responses=problem_responses(404, 422, 500, 503))
def list_job_artifacts(
    *,
    services: ServicesOf,
    root_path: RootPath,
    job_id: JobIdInPath,
    kind: Annotated[ArtifactKind | None, Query(description="Only artifacts of this kind.")] = None,
    limit: Limit = 50,
    cursor: Cursor = None,
) -> ArtifactList:
    """The files that the job made, newest first."""
    with reading(services.sessions) as session:
        jobs.get_job(session=session, job_id=job_id)
        page = artifacts.list_artifacts(session=session, job_id=job_id, kind=kind, limit=limit, cursor=cursor)
    return ArtifactList.of(page.rows, page.next_cursor, root_path)
