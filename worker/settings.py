"""A worker's settings: environment variables `CLIPRD_…` (or files that `CLIPRD_…_FILE` name), with their defaults here and nowhere else."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Annotated, Self

from pydantic import Field, SecretStr, field_validator, model_validator
from pydantic_settings import NoDecode

from cliprd_core.locations import Locations
from cliprd_core.run_dir import CACHE_DIR_VARIABLE, DEFAULT_SHARD_CACHE_BYTES, SHARD_CACHE_BYTES_VARIABLE, TEACHER_STORE_VARIABLE
from service.environment import EnvironmentSettings
from service.logs import LogFormat
from service.settings import Hosts, Roots
from service.store.recovery import LONGEST_LEASE_SECONDS

MIN_SECRET_BYTES, MAX_SECRET_BYTES = 24, 64


class WorkerSettings(EnvironmentSettings):
    """Shared with the API: database, broker and artifact store. The rest is the worker's own."""

    database_url: str = Field(default="sqlite:///.cliprd/cliprd.db", description="`sqlite:///FILE` or `postgresql://…`, as the API's.")
    broker_url: str = Field(default="redis://127.0.0.1:6379/0", description="Redis, as the API's.")
    artifacts_root: Path = Field(default=Path(".cliprd/artifacts"), description="Folder of the artifact store, as the API's.")
    artifacts_url: str = Field(default="", description="`s3://BUCKET/PREFIX` in place of that folder, as the API's.")
    runs_root: Path = Field(default=Path(".cliprd/runs"), description="Run directories of this machine's jobs, one each.")
    teacher_store_root: Path = Field(
        default=Path(".cliprd/teacher-stores"), description="Folder of the teacher stores, as the API's; on a disk of this machine."
    )
    teacher_store_max_bytes: int = Field(
        default=200_000_000_000,
        ge=0,
        description="Before each job, stores are deleted until all together take at most this on disk; the longest unused first.",
    )
    home: Path = Field(default=Path(".cliprd"), description="As the API's.")
    data_root: Path = Field(default=Path(), description="As the API's; only `data_roots` falls back on it.")
    data_roots: Roots = Field(default=(), description="As the API's: the trainer looks again at what it opens.")
    remote_hosts: Hosts = Field(default=(), description="As the API's.")
    cache_dir: Path = Field(default=Path(".cliprd/cache"), description="What all jobs remember of data: shard indexes, remote shards.")
    shard_cache_bytes: int = Field(default=DEFAULT_SHARD_CACHE_BYTES, ge=1, description="Most that copies of remote shards take there.")
    queues: Annotated[tuple[str, ...], NoDecode] = Field(default=("default",), description="Queues to take jobs from; comma-separated.")
    lease_seconds: float = Field(
        default=120.0,
        gt=0,
        le=LONGEST_LEASE_SECONDS,
        description="A worker silent for this long loses its job to another; 600 at most. So long it trains on without its database.",
    )
    heartbeat_seconds: float = Field(default=10.0, gt=0, description="Pause between renewals of the lease.")
    grace_seconds: float = Field(default=25.0, gt=0, description="From SIGTERM to SIGKILL: the time a run has to save a checkpoint.")
    poll_seconds: float = Field(default=0.5, gt=0, description="Pause between looks at a run's files and at cancel requests.")
    health_file: Path | None = Field(
        default=None, description="What `python -m worker.health` reads, for probes; of this worker alone, on a disk of this machine."
    )
    health_seconds: float = Field(
        default=5.0, gt=0, description="Pause between a worker's heartbeats: looks at its consumer, broker and database, and reports."
    )
    reaper_seconds: float = Field(default=5.0, gt=0, description="Pause between rounds of the reaper, of deletions, and of webhooks.")
    resend_seconds: float = Field(default=30.0, gt=0, description="A queued job whose message is this old is sent again.")
    trainer: str = Field(default="-m cliprd_core.train", description="What torchrun starts: `-m MODULE` or a script, and arguments.")
    mirrored_checkpoints: int = Field(default=2, ge=1, description="Newest checkpoints of a job kept in the artifact store.")
    checkpoint_retention_seconds: float = Field(
        default=7 * 24 * 3600.0,
        ge=0,
        description="How long a retry finds what it goes on from: after a job's end its mirrored checkpoints stay for so long if it failed"
        " or was cancelled, and its run directories however it ended.",
    )

    log_format: LogFormat = Field(default=LogFormat.TEXT, description="`json`: one object a line, with job id and attempt.")

    def locations_of(self, run: Path) -> Locations:
        """Where a job may read from: as the API says, and its own run directory, where fetched teachers are."""
        return Locations.of([*(self.data_roots or (self.data_root,)), run], self.remote_hosts, home=self.home)

    @property
    def trainer_environment(self) -> dict[str, str]:
        """What the trainer is to know of these settings."""
        return {
            CACHE_DIR_VARIABLE: str(self.cache_dir.absolute()),
            SHARD_CACHE_BYTES_VARIABLE: str(self.shard_cache_bytes),
            TEACHER_STORE_VARIABLE: str(self.teacher_store_root.absolute()),
        }

    webhook_urls: Annotated[tuple[str, ...], NoDecode] = Field(
        default=(),
        description="Told of every job's changes of state; comma-separated. A worker without any leaves that to others; those with some"
        " need the same ones.",
    )
    webhook_secret: SecretStr | None = Field(
        default=None,
        description="Signs webhooks (Standard Webhooks): `whsec_` and base64 of 24 to 64 random bytes. Several, comma-separated, all sign,"
        " so that receivers can change over from one to the next.",
    )

    @property
    def webhook_secrets(self) -> tuple[str, ...]:
        """All that sign."""
        return () if self.webhook_secret is None else _names(self.webhook_secret.get_secret_value())

    @field_validator("queues", "webhook_urls", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        if isinstance(value, str):
            return _names(value)
        return value

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if not self.queues:
            raise ValueError("queues: name at least one, as in CLIPRD_QUEUES=default")
        if self.heartbeat_seconds * 2 > self.lease_seconds:
            raise ValueError("heartbeat_seconds must be at most half of lease_seconds, or one missed heartbeat loses the job")
        if self.webhook_urls:
            _check_webhooks(self.webhook_urls, self.webhook_secrets)
        return self


def _names(value: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in value.split(",") if name.strip())


def _check_webhooks(urls: tuple[str, ...], secrets: tuple[str, ...]) -> None:
    for url in urls:
        if not url.startswith(("http://", "https://")):
            raise ValueError(f"webhook_urls: {url!r} is no address; write it as https://HOST/PATH")
    if not secrets or not all(_is_secret(secret) for secret in secrets):
        raise ValueError(
            "webhook_secret: webhooks need one to be signed with, or several, comma-separated; make it with"
            """ `python -c "import base64, os; print('whsec_' + base64.b64encode(os.urandom(32)).decode())"`"""
        )


def _is_secret(encoded: str) -> bool:
    try:
        num_bytes = len(base64.b64decode(encoded.removeprefix("whsec_"), validate=True))
    except ValueError:
        return False
    return encoded.startswith("whsec_") and MIN_SECRET_BYTES <= num_bytes <= MAX_SECRET_BYTES
