"""The tables. Whatever changes here needs a migration; a test compares the two."""

from __future__ import annotations

from datetime import UTC, datetime
from enum import StrEnum
from typing import Any

from sqlalchemy import JSON, BigInteger, DateTime, Dialect, Double, Enum, ForeignKey, Index, Integer, String, Text, UniqueConstraint
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from sqlalchemy.types import TypeDecorator

from service.store.failure_policy import DEFAULT_MAX_ATTEMPTS
from service.store.kinds import ArtifactKind, EventKind
from service.store.scopes import KeyScope
from service.store.states import JobState


class UtcDateTime(TypeDecorator[datetime]):
    """Aware datetimes in UTC on every database; SQLite, which knows no time zones, keeps them naive."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:  # noqa: ARG002
        if value is None:
            return None
        assert value.tzinfo is not None, "naive datetime"
        return value.astimezone(UTC)

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:  # noqa: ARG002
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


def _enum_column(kind: type[StrEnum]) -> Enum:
    """Stored as the member's value in a plain string, so that a new member needs no migration."""
    return Enum(kind, native_enum=False, length=16, values_callable=lambda members: [member.value for member in members])


class Base(DeclarativeBase):
    """Base of all tables."""

    type_annotation_map = {  # noqa: RUF012  (SQLAlchemy's own protocol)
        datetime: UtcDateTime(),
        dict[str, Any]: JSON(none_as_null=True),
        list[str]: JSON(),
        list[dict[str, Any]]: JSON(),
        JobState: _enum_column(JobState),
        ArtifactKind: _enum_column(ArtifactKind),
        EventKind: _enum_column(EventKind),
        KeyScope: _enum_column(KeyScope),
    }


class Job(Base):
    """One distillation job. Times are UTC. Only `service.store` changes `state`."""

    __tablename__ = "jobs"
    __table_args__ = (
        Index("jobs_newest", "created_at", "id"),
        Index("jobs_newest_by_state", "state", "created_at", "id"),
        Index("jobs_by_lease", "state", "lease_expires_at"),
    )

    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    name: Mapped[str] = mapped_column(String(128))
    recipe: Mapped[str] = mapped_column(String(64))
    state: Mapped[JobState]
    spec: Mapped[dict[str, Any]]
    """The resolved JobSpec: recipe applied, paths absolute."""
    queue: Mapped[str] = mapped_column(String(64))
    priority: Mapped[int] = mapped_column(Integer, default=0)
    """Of the queued jobs of a queue, the one with the highest is claimed first, the oldest of several."""

    attempt: Mapped[int] = mapped_column(Integer, default=0)
    """How often the job was claimed; the running attempt's number."""
    num_releases: Mapped[int] = mapped_column(Integer, default=0)
    """Attempts that don't count against `max_attempts`: their worker ended them in good order, unfinished, or they came before a retry, or
    before one that got further."""
    num_lost: Mapped[int] = mapped_column(Integer, default=0, server_default="0")
    """Unused since `EndedAttempts` counts. Older workers read it until they are replaced, so only a later version can drop it."""
    max_attempts: Mapped[int] = mapped_column(Integer, default=DEFAULT_MAX_ATTEMPTS)
    attempt_started_at: Mapped[datetime | None]
    """When the latest attempt was claimed."""
    seconds_run: Mapped[float] = mapped_column(Double, default=0.0)
    """From claim to end, over the ended attempts since the job was made or last retried."""
    worker: Mapped[str | None] = mapped_column(String(255))
    """Name of the worker of the latest attempt."""
    lease_token: Mapped[str | None] = mapped_column(String(64))
    """Known to the holder alone; set while running."""
    lease_expires_at: Mapped[datetime | None]
    cancel_requested_at: Mapped[datetime | None]
    pause_requested_at: Mapped[datetime | None]
    """Set while its worker is asked to pause it."""

    created_at: Mapped[datetime]
    queued_at: Mapped[datetime | None]
    """When it last became claimable, or will, where it is to wait before it is tried again. Null: it has been waiting ever since."""
    sent_at: Mapped[datetime | None]
    """When a worker last sent its message. Null: not since it was queued; the API, which sends it at that moment, doesn't note it."""
    started_at: Mapped[datetime | None]
    """When the first attempt's training process started."""
    finished_at: Mapped[datetime | None]

    progress: Mapped[dict[str, Any] | None]
    """Latest run_dir.Progress."""
    metrics: Mapped[dict[str, Any] | None]
    """Latest value of every metric, by name."""
    error: Mapped[dict[str, Any] | None]
    """run_dir.ErrorRecord of a failed job."""
    result: Mapped[dict[str, Any] | None]
    """run_dir.ResultRecord of a succeeded job."""

    @property
    def labels(self) -> dict[str, str]:
        labels: dict[str, str] = self.spec.get("labels", {})  # a spec of another version, too, must be told of
        return labels

    @property
    def failed_attempts(self) -> int:
        """Attempts that count against `max_attempts`, of those that have ended."""
        is_sound = self.state in (JobState.RUNNING, JobState.SUCCEEDED)
        return self.attempt - self.num_releases - is_sound

    @property
    def teacher_job_ids(self) -> list[str]:
        """The jobs of this service whose results are the teachers, in the spec's order."""
        given = [self.spec["teacher"], *self.spec.get("teachers", [])]
        return [teacher["job"] for teacher in given if teacher is not None and teacher["job"] is not None]


class JobLabel(Base):
    """The labels of `jobs.spec` once more, to find jobs by them on any database."""

    __tablename__ = "job_labels"
    __table_args__ = (Index("job_labels_by_value", "key", "value", "job_id"),)

    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True)
    key: Mapped[str] = mapped_column(String(64), primary_key=True)
    value: Mapped[str] = mapped_column(String(128))


Index("jobs_to_claim_first", Job.state, Job.queue, Job.priority.desc(), Job.created_at, Job.id)

LOCK_ORDER = (Job.created_at, Job.id)
"""In which everyone locks several jobs: a teacher is older than its students, and is locked before them."""


class JobTeacher(Base):
    """A job whose teacher, or one of whose teachers, is another job's result, be it named by job or by artifact."""

    __tablename__ = "job_teachers"
    __table_args__ = (Index("job_teachers_by_teacher", "teacher_job_id"),)

    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True)
    teacher_job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"), primary_key=True)


class JobEvent(Base):
    """One thing that happened to a job, written in the transaction that did it. Of one job, a later event has a higher id."""

    __tablename__ = "job_events"
    __table_args__ = (Index("job_events_by_job", "job_id", "id"), {"sqlite_autoincrement": True})

    id: Mapped[int] = mapped_column(BigInteger().with_variant(Integer, "sqlite"), primary_key=True)
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"))
    kind: Mapped[EventKind]
    attempt: Mapped[int]
    data: Mapped[dict[str, Any]]
    created_at: Mapped[datetime]


class WebhookDelivery(Base):
    """A message about a job that is still to be delivered: the outbox, written in the transaction of the event it tells of."""

    __tablename__ = "webhook_deliveries"
    __table_args__ = (Index("webhook_deliveries_by_time", "next_try_at"), {"sqlite_autoincrement": True})

    id: Mapped[int] = mapped_column(BigInteger().with_variant(Integer, "sqlite"), primary_key=True)
    message_id: Mapped[str] = mapped_column(String(64))
    """The same for every URL and every try."""
    url: Mapped[str | None] = mapped_column(Text)
    """Null: not yet addressed; only a worker knows the URLs."""
    body: Mapped[str] = mapped_column(Text)
    num_tries: Mapped[int]
    next_try_at: Mapped[datetime]


class LogChunk(Base):
    """Some of what a job's training processes printed, over all attempts."""

    __tablename__ = "log_chunks"

    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True)
    start: Mapped[int] = mapped_column(BigInteger, primary_key=True, autoincrement=False)
    """Characters of the job's log before this chunk."""
    end: Mapped[int] = mapped_column(BigInteger)
    text: Mapped[str] = mapped_column(Text)


class IdempotencyKey(Base):
    """A submission's `Idempotency-Key`, and the job it made. It outlives the job, so that a late repeat makes no second one."""

    __tablename__ = "idempotency_keys"
    __table_args__ = (Index("idempotency_keys_by_age", "created_at"),)

    key: Mapped[str] = mapped_column(String(255), primary_key=True)
    body_sha256: Mapped[str] = mapped_column(String(64))
    job_id: Mapped[str] = mapped_column(String(64))
    """Of no job any more, if that was deleted."""
    created_at: Mapped[datetime]


class Metric(Base):
    """One value at one step. The latest attempt's value replaces an earlier one's, so a replayed record changes nothing."""

    __tablename__ = "metrics"

    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True)
    name: Mapped[str] = mapped_column(String(255), primary_key=True)
    step: Mapped[int] = mapped_column(BigInteger, primary_key=True, autoincrement=False)
    attempt: Mapped[int]
    value: Mapped[float] = mapped_column(Double)


class MetricStep(Base):
    """A step at which metrics were measured, with its place in the order of writing, by which streams of metrics go on."""

    __tablename__ = "metric_steps"
    __table_args__ = (Index("metric_steps_in_order", "job_id", "position", unique=True),)

    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True)
    step: Mapped[int] = mapped_column(BigInteger, primary_key=True, autoincrement=False)
    position: Mapped[int] = mapped_column(BigInteger)
    """Of a job's steps, the one that values were last written of has the highest. It is always more than the step itself."""


class MetricRollup(Base):
    """The lowest and the highest point of a metric in `width` steps from step `bucket * width` on; see `service.store.rollups`."""

    __tablename__ = "metric_rollups"

    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True)
    name: Mapped[str] = mapped_column(String(255), primary_key=True)
    width: Mapped[int] = mapped_column(Integer, primary_key=True, autoincrement=False)
    bucket: Mapped[int] = mapped_column(BigInteger, primary_key=True, autoincrement=False)
    low_step: Mapped[int] = mapped_column(BigInteger)
    low_value: Mapped[float] = mapped_column(Double)
    high_step: Mapped[int] = mapped_column(BigInteger)
    high_value: Mapped[float] = mapped_column(Double)


class Evaluation(Base):
    """One run_dir.EvaluationRecord; replaced like a metric."""

    __tablename__ = "evaluations"

    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True)
    step: Mapped[int] = mapped_column(BigInteger, primary_key=True, autoincrement=False)
    task: Mapped[str] = mapped_column(String(32), primary_key=True)
    dataset: Mapped[str] = mapped_column(String(255), primary_key=True)
    attempt: Mapped[int]
    record: Mapped[dict[str, Any]]


class Artifact(Base):
    """One file that a job made. Its bytes lie in the blob store under `storage_key`."""

    __tablename__ = "artifacts"
    __table_args__ = (
        UniqueConstraint("job_id", "kind", "group_name", "name", name="artifacts_one_per_name"),
        Index("artifacts_newest", "created_at", "id"),
        Index("artifacts_newest_by_job", "job_id", "created_at", "id"),
    )

    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"))
    kind: Mapped[ArtifactKind]
    group: Mapped[str] = mapped_column("group_name", String(128))
    """Files of one group belong together: `export`, `step-0000000100`."""
    step: Mapped[int | None] = mapped_column(BigInteger)
    """Optimiser updates done when it was made."""
    name: Mapped[str] = mapped_column(String(255))
    """File name, without folders."""
    num_bytes: Mapped[int] = mapped_column(BigInteger)
    sha256: Mapped[str] = mapped_column(String(64))
    """Lower-case hexadecimal."""
    media_type: Mapped[str] = mapped_column(Text)
    storage_key: Mapped[str] = mapped_column(String(255))
    created_at: Mapped[datetime]


class UnneededBlob(Base):
    """Bytes in the blob store that no artifact names any more, or yet; see `service.store.unneeded_blobs`."""

    __tablename__ = "unneeded_blobs"
    __table_args__ = (Index("unneeded_blobs_by_time", "next_try_at"),)

    storage_key: Mapped[str] = mapped_column(String(255), primary_key=True)
    num_tries: Mapped[int] = mapped_column(Integer, default=0, server_default="0")
    """Begun to delete them."""
    next_try_at: Mapped[datetime]
    lease_token: Mapped[str | None] = mapped_column(String(64))
    """Of the attempt that uploads them: while it holds its job, they are needed. Null: nobody uploads them."""


class Worker(Base):
    """One worker process as it last reported; see `service.store.workers`."""

    __tablename__ = "workers"

    id: Mapped[str] = mapped_column(String(255), primary_key=True)
    """As in `jobs.worker`: machine, process, and something random, since containers have the same process ids again and again."""
    host: Mapped[str] = mapped_column(String(255))
    queues: Mapped[list[str]]
    problems: Mapped[list[str]]
    """What keeps it from taking jobs. None: it takes them."""
    gpus: Mapped[list[dict[str, Any]]]
    """GpuReading of each GPU that it sees."""
    started_at: Mapped[datetime]
    heartbeat_at: Mapped[datetime]
    expires_at: Mapped[datetime]
    """From then on it counts as lost, unless it reports again."""


class DeletedJob(Base):
    """A job that was deleted, so that its run directory can go: an unknown id alone could also be one that this database lost."""

    __tablename__ = "deleted_jobs"

    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    """The job's."""
    deleted_at: Mapped[datetime]


class EndedAttempts(Base):
    """How many attempts at jobs of a queue have ended in one way, ever: it only grows, whatever becomes of the jobs."""

    __tablename__ = "ended_attempts"

    queue: Mapped[str] = mapped_column(String(64), primary_key=True)
    outcome: Mapped[str] = mapped_column(String(32), primary_key=True)
    """One of `attempt_counts.OUTCOMES`."""
    num_attempts: Mapped[int] = mapped_column(BigInteger)


class ApiKey(Base):
    """One API key; see `service.store.keys`. Rows stay when a key is revoked."""

    __tablename__ = "api_keys"

    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    name: Mapped[str] = mapped_column(String(128))
    scope: Mapped[KeyScope]
    key_hash: Mapped[str] = mapped_column(String(64), unique=True)
    """SHA-256 of the key, lower-case hexadecimal."""
    created_at: Mapped[datetime]
    last_used_at: Mapped[datetime | None]
    """To within a few minutes."""
    revoked_at: Mapped[datetime | None]
