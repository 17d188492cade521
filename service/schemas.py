"""What the API answers with. Field names are its contract."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, GetJsonSchemaHandler, field_validator
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

from cliprd_core.run_dir import ErrorReason, ErrorRecord, EvaluationRecord, EvaluationTask, Progress, ResultRecord
from cliprd_core.spec import JobSpec, LabelName, LabelValue
from service.store.failure_policy import what_to_do
from service.store.kinds import ArtifactKind, EventKind
from service.store.metrics import Series
from service.store.models import Artifact, Job, JobEvent
from service.store.states import JobState


class _DescribedAsJobSpec:
    """Documents a plain object as a JobSpec."""

    def __get_pydantic_json_schema__(self, _: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        return handler(JobSpec.__pydantic_core_schema__)


StoredSpec = Annotated[dict[str, Any], _DescribedAsJobSpec()]
"""A JobSpec as it was stored. It isn't validated again: old jobs must stay readable when the spec changes."""


class View(BaseModel):
    """Base of all answers."""

    model_config = ConfigDict(frozen=True)


class JobErrorView(View):
    """Why a job failed."""

    reason: ErrorReason
    message: str = Field(description="What is wrong.")
    what_to_do: str = Field(
        description="What to do: first about this very failure, where that is known, then what its reason always calls for.",
        examples=["Set `training.micro_batch_size` to 512 (…). Clone the job with a change that needs less memory."],
    )
    detail: str = Field(description="Evidence: a traceback, or the last lines of the run's log.")

    @classmethod
    def of(cls, error: ErrorRecord) -> Self:
        return cls(reason=error.reason, message=error.message, what_to_do=what_to_do(error), detail=error.detail)


class JobLinks(View):
    """Where the rest of a job is."""

    self: str
    cancel: str
    pause: str
    resume: str
    retry: str
    clone: str
    events: str
    log: str
    metrics: str
    metrics_stream: str
    evaluations: str
    artifacts: str


class JobView(View):
    """One job."""

    id: str
    name: str
    labels: dict[str, str]
    recipe: str
    state: JobState
    attempt: int = Field(
        description="Which attempt runs or ran last; 0 before the first. It counts all, also those after a pause or a retry, so it may be"
        " more than `max_attempts`, which bounds `failed_attempts`."
    )
    failed_attempts: int = Field(
        default=0,
        description="Attempts that failed, or whose worker was lost, since the job was submitted, last retried, or last stored a checkpoint"
        " further on than any before. One that was paused,"
        " cancelled, or given back by a worker that shut down is none.",
    )
    max_attempts: int = Field(
        description="The job fails at so many `failed_attempts`; before, it is tried again by itself after a failure that may pass (a lost"
        " worker, a full disk). Any other failure ends it at once."
    )
    worker: str | None = Field(description="Worker of the latest attempt.")
    waiting_for: str | None = Field(
        default=None, description="Why a queued job can't start: no worker takes its queue. Null: one does. Only told when reading one job."
    )
    teacher_job_ids: list[str] = Field(description="The jobs whose results are teachers; it waits until they have succeeded.")
    created_at: datetime
    queued_at: datetime | None
    started_at: datetime | None = Field(description="When training first started.")
    finished_at: datetime | None
    cancel_requested_at: datetime | None
    pause_requested_at: datetime | None = Field(description="Set while its worker is asked to pause it.")
    progress: Progress | None
    metrics: dict[str, float] = Field(description="Latest value of every metric.")
    error: JobErrorView | None
    result: ResultRecord | None
    spec: StoredSpec = Field(description="As it runs: recipe applied, paths absolute.")
    links: JobLinks

    @classmethod
    def of(cls, job: Job, root_path: str = "", *, waiting_for: str | None = None) -> Self:
        """A row as the API shows it; `root_path` is where a proxy has mounted the API."""
        here = f"{root_path}/jobs/{job.id}"
        return cls(
            id=job.id,
            name=job.name,
            labels=job.labels,
            recipe=job.recipe,
            state=job.state,
            attempt=job.attempt,
            failed_attempts=job.failed_attempts,
            max_attempts=job.max_attempts,
            worker=job.worker,
            waiting_for=waiting_for,
            teacher_job_ids=job.teacher_job_ids,
            created_at=job.created_at,
            queued_at=job.queued_at,
            started_at=job.started_at,
            finished_at=job.finished_at,
            cancel_requested_at=job.cancel_requested_at,
            pause_requested_at=job.pause_requested_at,
            progress=None if job.progress is None else Progress.model_validate(job.progress),
            metrics=job.metrics or {},
            error=None if job.error is None else JobErrorView.of(ErrorRecord.model_validate(job.error)),
            result=None if job.result is None else ResultRecord.model_validate(job.result),
            spec=job.spec,
            links=JobLinks(
                self=here,
                cancel=f"{here}/cancel",
                pause=f"{here}/pause",
                resume=f"{here}/resume",
                retry=f"{here}/retry",
                clone=f"{here}/clone",
                events=f"{here}/events",
                log=f"{here}/log",
                metrics=f"{here}/metrics",
                metrics_stream=f"{here}/metrics/stream",
                evaluations=f"{here}/evaluations",
                artifacts=f"{here}/artifacts",
            ),
        )


class JobList(View):
    """A page of jobs, newest first."""

    jobs: list[JobView]
    next_cursor: str | None = Field(description="Give it as `cursor` for the next page. Null: this was the last.")


class EventView(View):
    """One thing that happened to a job."""

    id: int = Field(description="Higher than that of every earlier event of the job; not the next number, as all jobs share them.")
    kind: EventKind = Field(
        description="`lease_lost`: the attempt's worker vanished. `attempt_lost`: the attempt failed for a `reason` that may pass."
    )
    time: datetime
    attempt: int
    data: dict[str, Any] = Field(description="What the kind brings along: `worker`, `step`, `reason`, `metrics`, …")

    @classmethod
    def of(cls, event: JobEvent) -> Self:
        return cls(id=event.id, kind=event.kind, time=event.created_at, attempt=event.attempt, data=event.data)


class EventList(View):
    """Events, oldest first."""

    events: list[EventView]

    @classmethod
    def of(cls, events: Sequence[JobEvent]) -> Self:
        return cls(events=[EventView.of(event) for event in events])


class LabelSelector(View):
    """Which jobs: those that carry all of these labels."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    labels: dict[LabelName, LabelValue] = Field(max_length=16, examples=[{"team": "vision"}], json_schema_extra={"minProperties": 1})

    @field_validator("labels", mode="after")
    @classmethod
    def _some(cls, value: dict[str, str]) -> dict[str, str]:
        if not value:
            raise ValueError('is empty, which would mean every job; give at least one label, as {"labels": {"team": "vision"}}')
        return value


class CancelledJobs(View):
    """What became of the jobs that were to be cancelled, by id."""

    cancelled: list[str] = Field(description="Cancelled at once: they hadn't started, or were paused.")
    requested: list[str] = Field(description="Running; their workers were asked to stop them.")


class SeriesView(View):
    """One metric; both lists are equally long."""

    steps: list[int]
    values: list[float]


class MetricsView(View):
    """Metrics by name."""

    series: dict[str, SeriesView]
    unmatched: list[str] = Field(
        default=[], description="Of the `names` asked for, those that are no metric's: misspelt, or not measured yet."
    )
    names: list[str] = Field(default=[], description="All metrics that the job has so far.")

    @classmethod
    def of(cls, series: dict[str, Series], *, unmatched: list[str], names: Iterable[str]) -> Self:
        views = {name: SeriesView(steps=one.steps, values=one.values) for name, one in series.items()}
        return cls(series=views, unmatched=unmatched, names=sorted(names))


class EvaluationView(View):
    """One data set's evaluation at one step. All values are fractions 0-1."""

    attempt: int
    step: int
    epoch: float = Field(description="Passes over the training pairs done by then, with fraction.")
    time: datetime
    task: EvaluationTask
    dataset: str = Field(description="The set's `name` in the spec.")
    num_samples: int = Field(description="Images evaluated.")
    metrics: dict[str, float] = Field(description="`zero_shot_top1`, `image_to_text_R@1`, …")
    chance: dict[str, float] = Field(description="What guessing scores, under the same names.")

    @classmethod
    def of(cls, record: EvaluationRecord) -> Self:
        return cls(**{**record.model_dump(), "time": datetime.fromtimestamp(record.time, UTC)})


class EvaluationList(View):
    """A page of a job's evaluations, by step."""

    evaluations: list[EvaluationView]
    next_cursor: str | None = Field(description="Give it as `cursor` for the next page. Null: this was the last.")


class ArtifactView(View):
    """One file that a job made. `href` gives its bytes."""

    id: str
    job_id: str
    kind: ArtifactKind = Field(
        description="`model`: of the trained student. `checkpoint`: for a resume; gone once the job has succeeded. `best_checkpoint`: the"
        " one that `training.keep_checkpoints.best` keeps as long as the job."
    )
    group: str = Field(description="Files of one group belong together.", examples=["export", "step-0000000100"])
    step: int | None = Field(description="Optimiser updates done when it was made.")
    name: str = Field(description="File name.")
    num_bytes: int
    sha256: str = Field(description="Of the bytes, lower-case hexadecimal; also their ETag.")
    media_type: str
    created_at: datetime
    href: str

    @classmethod
    def of(cls, artifact: Artifact, root_path: str = "") -> Self:
        fields = (name for name in cls.model_fields if name != "href")
        return cls(**{name: getattr(artifact, name) for name in fields}, href=f"{root_path}/artifacts/{artifact.id}")


class ArtifactList(View):
    """A page of artifacts, newest first."""

    artifacts: list[ArtifactView]
    next_cursor: str | None = Field(description="Give it as `cursor` for the next page. Null: this was the last.")

    @classmethod
    def of(cls, rows: Sequence[Artifact], next_cursor: str | None, root_path: str) -> Self:
        return cls(artifacts=[ArtifactView.of(row, root_path) for row in rows], next_cursor=next_cursor)


class Health(View):
    """The process is up, or ready."""

    status: str
