"""Jobs: submit, list, read, and what they measured."""

from __future__ import annotations

import re
from typing import Annotated

from anyio.to_thread import run_sync
from fastapi import APIRouter, Body, Header, Query, Request, Response
from fastapi.responses import JSONResponse

from cliprd_core.spec import JobSpec
from service.dry_run import dry_run
from service.dry_run_schemas import DryRunView
from service.errors import NoSuchLabelError, problem_responses
from service.examples import EXAMPLES
from service.routes.dependencies import Cursor, JobIdInPath, Limit, RootPath, ServicesOf, root_path_of, services_of
from service.schemas import ArtifactList, EvaluationList, EvaluationView, JobList, JobView, MetricsView
from service.store import artifacts, jobs, metrics
from service.store.kinds import ArtifactKind
from service.store.session import reading
from service.store.states import JobState
from service.store.workers import complaint_about_queue
from service.strict_query import MAX_METRIC_NAMES, StrictRoute, metric_names
from service.submission import submit

router = APIRouter(prefix="/jobs", tags=["jobs"], route_class=StrictRoute)

_LABEL = re.compile(r"([A-Za-z0-9_.-]{1,64})=([A-Za-z0-9_.-]{0,128})")

_REPLAYED = {
    "Idempotency-Replayed": {
        "description": "`true`: an earlier submission under this `Idempotency-Key` made the job. Absent: this one did.",
        "schema": {"type": "string", "enum": ["true"]},
    }
}


@router.post(
    "",
    status_code=201,
    summary="Submit a job",
    response_model=JobView,
    responses={
        200: {"description": "Dry run: what the job would be", "model": DryRunView},
        201: {"headers": _REPLAYED},
        **problem_responses(500, 503),
    },
)
async def submit_job(
    *,
    request: Request,
    spec: Annotated[JobSpec, Body(openapi_examples=EXAMPLES)],
    idempotency_key: Annotated[
        str | None,
        Header(
            alias="Idempotency-Key",
            min_length=1,
            max_length=255,
            pattern=r"^[\x21-\x7e]+$",
            description="Repeating a submission under one key makes one job. Note that curl leaves out a header without a value.",
        ),
    ] = None,
    is_dry_run: Annotated[bool, Query(alias="dry_run", description="Only check the spec, and answer what it would become (200).")] = False,
) -> Response:
    """Check the spec, store the job, and send it to the workers of its queue. All problems are named at once (422), but for those that only
    an otherwise sound spec tells: fields that don't fit each other, too few pairs for a batch, a teacher's job that can't be one.

    With an `Idempotency-Key` (a UUID, say) a submission whose answer was lost can be repeated for two days: the same key and spec answer
    with the same job, and `Idempotency-Replayed: true`. The same key and another spec are refused (422), as is the key of a job that was
    deleted.
    """
    services = services_of(request)  # not as dependencies, which take a tenth of a submission's time
    if is_dry_run:
        found = await run_sync(dry_run, services, spec, limiter=services.file_looks)
        return JSONResponse(found.model_dump(mode="json"))
    job, is_replayed = await submit(services, spec, key=idempotency_key)
    view = JobView.of(job, root_path_of(request))
    headers = {"Location": view.links.self, **({"Idempotency-Replayed": "true"} if is_replayed else {})}
    return Response(view.model_dump_json(by_alias=True), 201, headers, media_type="application/json")  # FastAPI would check the view again


@router.get("", summary="List jobs, newest first", responses=problem_responses(500, 503))
def list_jobs(
    *,
    services: ServicesOf,
    root_path: RootPath,
    state: Annotated[JobState | None, Query(description="Only jobs in this state.")] = None,
    label: Annotated[list[str], Query(max_length=16, description="`key=value`; repeat it: all must match.")] = [],  # noqa: B006
    limit: Limit = 50,
    cursor: Cursor = None,
) -> JobList:
    """A page of jobs; it may have fewer than `limit` where specs are very long. Pages stay stable while jobs are added."""
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
    """State, progress, latest metrics, and error or result; of a queued job also whether any worker takes its queue."""
    with reading(services.sessions) as session:
        job = jobs.get_job(session=session, job_id=job_id)
        waiting_for = complaint_about_queue(session=session, queue=job.queue) if job.state is JobState.QUEUED else None
        return JobView.of(job, root_path, waiting_for=waiting_for)


@router.get("/{job_id}/metrics", summary="Metric series", responses=problem_responses(404, 500, 503))
def read_metrics(
    services: ServicesOf,
    job_id: JobIdInPath,
    names: Annotated[
        list[str], Query(max_length=MAX_METRIC_NAMES, description="Names, or prefixes that end in `*`; separated by commas, or repeated.")
    ] = ["*"],  # noqa: B006
    since_step: Annotated[int, Query(ge=0, lt=2**63, description="First step of interest.")] = 0,
    max_points: Annotated[
        int, Query(ge=metrics.MIN_POINTS, le=10_000, description="Points of one series, at most; peaks and dips survive.")
    ] = 1000,
) -> MetricsView:
    """Series of what was measured while training. Asking for a metric that isn't there is no error, since it may come yet: `unmatched`
    tells of it, beside the `names` that there are."""
    patterns = metric_names(names)
    with reading(services.sessions) as session:
        job = jobs.get_job(session=session, job_id=job_id)
        series = metrics.series(session=session, job=job, names=patterns, since_step=since_step, max_points=max_points)
    return MetricsView.of(series, unmatched=metrics.unmatched(job, patterns), names=job.metrics or {})


@router.get("/{job_id}/evaluations", summary="Evaluations", responses=problem_responses(404, 500, 503))
def read_evaluations(
    services: ServicesOf,
    job_id: JobIdInPath,
    limit: Annotated[
        int, Query(ge=1, le=metrics.MAX_EVALUATIONS, description="Evaluations of one page, at most.")
    ] = metrics.MAX_EVALUATIONS,
    cursor: Cursor = None,
) -> EvaluationList:
    """Everything that was evaluated, by step; values are fractions 0-1."""
    with reading(services.sessions) as session:
        jobs.get_job(session=session, job_id=job_id)
        page = metrics.list_evaluations(session=session, job_id=job_id, limit=limit, cursor=cursor)
    return EvaluationList(evaluations=[EvaluationView.of(one) for one in page.rows], next_cursor=page.next_cursor)


@router.get("/{job_id}/artifacts", summary="A job's artifacts", responses=problem_responses(404, 500, 503))
def list_job_artifacts(
    *,
    services: ServicesOf,
    root_path: RootPath,
    job_id: JobIdInPath,
    kind: Annotated[ArtifactKind | None, Query(description="Only artifacts of this kind.")] = None,
    limit: Limit = 50,
    cursor: Cursor = None,
) -> ArtifactList:
    """The files that the job made, newest first. Of a job that has succeeded these are its model and its best checkpoint, where the spec
    keeps one; the other checkpoints, which a resume would have needed, are deleted from the artifact store then."""
    with reading(services.sessions) as session:
        jobs.get_job(session=session, job_id=job_id)
        page = artifacts.list_artifacts(session=session, job_id=job_id, kind=kind, limit=limit, cursor=cursor)
    return ArtifactList.of(page.rows, page.next_cursor, root_path)
