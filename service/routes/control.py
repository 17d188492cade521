"""Jobs that exist: cancel, pause, resume, retry, clone, delete.

Cancel, pause and resume say how a job shall be, so that asking again for what is so already, or under way, changes nothing and is no
error. Retry and delete do something with a finished job, and refuse any other.
"""

from __future__ import annotations

from contextlib import suppress
from http import HTTPStatus
from typing import Annotated, Any

from anyio.to_thread import run_sync
from fastapi import APIRouter, Body, Response

from cliprd_core.spec import JobSpec
from service.errors import problem_responses
from service.routes.dependencies import JobIdInPath, RootPath, Services, ServicesOf
from service.schemas import CancelledJobs, JobView, LabelSelector
from service.store import jobs
from service.store.session import reading
from service.strict_query import StrictRoute
from service.submission import cloned_spec, submit

router = APIRouter(prefix="/jobs", tags=["jobs"], route_class=StrictRoute)


Overrides = Annotated[
    dict[str, Any],
    Body(
        description="Fields of the spec to replace, object by object; null where a field is to be left out, or a label to be removed.",
        openapi_examples={"longer": {"value": {"name": "longer", "training": {"epochs": 64}}}},
    ),
]


@router.post("/cancel", summary="Cancel all jobs with some labels", responses=problem_responses(500, 503))
def cancel_jobs(services: ServicesOf, selector: LabelSelector) -> CancelledJobs:
    """Cancels every job that carries all of these labels and hasn't finished, each as if it was cancelled by itself."""
    with reading(services.sessions) as session:
        job_ids = jobs.unfinished_jobs(session=session, labels=selector.labels)
    cancelled: list[str] = []
    requested: list[str] = []
    for job_id in job_ids:  # each in a transaction of its own, so that no two jobs are locked in an order of our own
        with suppress(jobs.JobFinishedError, jobs.JobNotFoundError), services.sessions.begin() as session:
            job = jobs.request_cancel(session=session, job_id=job_id)
            (cancelled if job.state.is_finished else requested).append(job_id)
    return CancelledJobs(cancelled=cancelled, requested=requested)


@router.post(
    "/{job_id}/cancel",
    summary="Cancel a job",
    responses={202: {"description": "Requested; its worker stops it", "model": JobView}, **problem_responses(404, 409, 500, 503)},
)
def cancel_job(services: ServicesOf, root_path: RootPath, job_id: JobIdInPath, response: Response) -> JobView:
    """A job that hasn't started or is paused is cancelled at once (200); a running one is asked to stop (202). Cancelling twice is the same
    as once; a job that has succeeded or failed can't be cancelled (409)."""
    with services.sessions.begin() as session:
        job = jobs.request_cancel(session=session, job_id=job_id)
    if not job.state.is_finished:
        response.status_code = HTTPStatus.ACCEPTED
    return JobView.of(job, root_path)


@router.post(
    "/{job_id}/pause",
    summary="Pause a job",
    responses={202: {"description": "Requested; its worker saves and stops it", "model": JobView}, **problem_responses(404, 409, 500, 503)},
)
def pause_job(services: ServicesOf, root_path: RootPath, job_id: JobIdInPath, response: Response) -> JobView:
    """A job that hasn't started is paused at once (200). A running one saves a checkpoint first (202) and frees its worker. Pausing twice
    is the same as once; a job that has finished or is being cancelled can't be paused (409)."""
    with services.sessions.begin() as session:
        job = jobs.request_pause(session=session, job_id=job_id)
    if job.pause_requested_at is not None:
        response.status_code = HTTPStatus.ACCEPTED
    return JobView.of(job, root_path)


@router.post("/{job_id}/resume", summary="Resume a paused job", responses=problem_responses(404, 409, 500, 503))
def resume_job(services: ServicesOf, root_path: RootPath, job_id: JobIdInPath) -> JobView:
    """A paused job is queued again and goes on from its newest checkpoint, on whichever worker takes it; a pause that was only requested is
    taken back. Resuming twice is the same as once: a job that waits, is queued or runs stays as it is (200). A job that has finished or
    is being cancelled can't be resumed (409)."""
    with services.sessions.begin() as session:
        job, queued = jobs.resume_job(session=session, job_id=job_id)
    services.queue.send(queued)
    return JobView.of(job, root_path)


@router.post("/{job_id}/retry", summary="Try a job again", responses=problem_responses(404, 409, 500, 503))
def retry_job(services: ServicesOf, root_path: RootPath, job_id: JobIdInPath) -> JobView:
    """A failed or cancelled job is queued again and goes on from its newest checkpoint, with as many attempts as a new one; any other
    can't be (409), so that of two retries of one failure the second is refused."""
    with services.sessions.begin() as session:
        job, queued = jobs.retry_job(session=session, job_id=job_id)
    services.queue.send(queued)
    return JobView.of(job, root_path)


@router.post("/{job_id}/clone", status_code=201, summary="Submit a job like this one", responses=problem_responses(404, 500, 503))
async def clone_job(
    services: ServicesOf,
    root_path: RootPath,
    job_id: JobIdInPath,
    response: Response,
    overrides: Overrides = {},  # noqa: B006
) -> JobView:
    """A new job from this one's resolved spec, with the given fields replaced; the whole is checked as a new submission is."""
    spec = await run_sync(_cloned_spec, services, job_id, overrides, limiter=services.file_looks)
    job, _ = await submit(services, spec)
    view = JobView.of(job, root_path)
    response.headers["Location"] = view.links.self
    return view


def _cloned_spec(services: Services, job_id: str, overrides: dict[str, Any]) -> JobSpec:
    with reading(services.sessions) as session:
        original = jobs.get_job(session=session, job_id=job_id)
    return cloned_spec(services, original, overrides)


@router.delete("/{job_id}", status_code=204, summary="Delete a job", responses=problem_responses(404, 409, 500, 503))
def delete_job(services: ServicesOf, job_id: JobIdInPath) -> None:
    """Forgets a finished job: its metrics, evaluations, log, and artifacts. A worker deletes their bytes soon after, when there is one. A
    job that hasn't finished, or that is a teacher of one that hasn't, stays (409)."""
    with services.sessions.begin() as session:
        jobs.delete_job(session=session, job_id=job_id)
