"""Jobs: cancel, pause, resume."""

from __future__ import annotations

from collections.abc import Sequence
from http import HTTPStatus

from fastapi import APIRouter, Response

from service.errors import problem_responses
from service.routes.dependencies import JobIdInPath, RootPath, Services, ServicesOf
from service.schemas import JobView
from service.store import jobs
from service.store.jobs import QueuedJob

router = APIRouter(prefix="/jobs", tags=["jobs"])


def send(services: Services, queued: Sequence[QueuedJob]) -> None:
    """Send the messages of jobs that became claimable; what the broker does not take, the reaper sends later."""
    sent = [job.job_id for job in queued if services.queue.send(job.job_id, job.queue)]
    if sent:
        with services.sessions.begin() as session:
            jobs.mark_sent(session=session, job_ids=sent)


@router.post(
    "/{job_id}/cancel",
    summary="Cancel a job",
    responses={202: {"description": "Requested; its worker stops it", "model": JobView}, **problem_responses(404, 409, 500, 503)},
)
def cancel_job(services: ServicesOf, root_path: RootPath, job_id: JobIdInPath, response: Response) -> JobView:
    """A job that hasn't started or is paused is cancelled at once (200); a running one is asked to stop (202); a finished one can't be
    (409)."""
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
    is the same as once; a finished or cancelled job can't be paused (409)."""
    with services.sessions.begin() as session:
        job = jobs.request_pause(session=session, job_id=job_id)
    if job.pause_requested_at is not None:
        response.status_code = HTTPStatus.ACCEPTED
    return JobView.of(job, root_path)


@router.post("/{job_id}/resume", summary="Resume a paused job", responses=problem_responses(404, 409, 500, 503))
def resume_job(services: ServicesOf, root_path: RootPath, job_id: JobIdInPath) -> JobView:
    """The job is queued again and goes on from its newest checkpoint, on whichever worker takes it. A job that isn't paused stays as it
    is, and a pause that was only requested is taken back; a finished job can't be resumed (409)."""
    with services.sessions.begin() as session:
        job, queued = jobs.resume_job(session=session, job_id=job_id)
    send(services, queued)
    return JobView.of(job, root_path)
