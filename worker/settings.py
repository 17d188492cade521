"""A worker's settings: environment variables `CLIPRD_…`, with their defaults here and nowhere else."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Annotated, Self

from pydantic import Field, SecretStr, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

MIN_SECRET_BYTES, MAX_SECRET_BYTES = 24, 64


class WorkerSettings(BaseSettings):
    """Shared with the API: database, broker and artifact store. The rest is the worker's own."""

    model_config = SettingsConfigDict(env_prefix="CLIPRD_", frozen=True, extra="ignore")

    database_url: str = Field(default="sqlite:///.cliprd/cliprd.db", description="`sqlite:///FILE` or `postgresql://…`, as the API's.")
    broker_url: str = Field(default="redis://127.0.0.1:6379/0", description="Redis, as the API's.")
    artifacts_root: Path = Field(default=Path(".cliprd/artifacts"), description="Folder of the artifact store, as the API's.")
    runs_root: Path = Field(default=Path(".cliprd/runs"), description="Run directories of this machine's jobs, one each.")
    queues: Annotated[tuple[str, ...], NoDecode] = Field(default=("default",), description="Queues to take jobs from; comma-separated.")
    lease_seconds: float = Field(default=60.0, gt=0, description="A worker silent for this long loses its job to another.")
    heartbeat_seconds: float = Field(default=10.0, gt=0, description="Pause between renewals of the lease.")
    grace_seconds: float = Field(default=25.0, gt=0, description="From SIGTERM to SIGKILL: the time a run has to save a checkpoint.")
    poll_seconds: float = Field(default=0.5, gt=0, description="Pause between looks at a run's files and at cancel requests.")
    reaper_seconds: float = Field(default=5.0, gt=0, description="Pause between the reaper's rounds.")
    resend_seconds: float = Field(default=30.0, gt=0, description="A queued job whose message is this old is sent again.")
    trainer: str = Field(default="-m cliprd_core.train", description="What torchrun starts: `-m MODULE` or a script, and arguments.")
    mirrored_checkpoints: int = Field(default=2, ge=1, description="Newest checkpoints of a job kept in the artifact store.")

    webhook_urls: Annotated[tuple[str, ...], NoDecode] = Field(
        default=(), description="Told of every job's changes of state; comma-separated. All workers need the same ones."
    )
    webhook_secret: SecretStr | None = Field(
        default=None, description="Signs webhooks (Standard Webhooks): `whsec_` and base64 of 24 to 64 random bytes."
    )

    @field_validator("queues", "webhook_urls", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        if isinstance(value, str):
            return tuple(name.strip() for name in value.split(",") if name.strip())
        return value

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if not self.queues:
            raise ValueError("queues: name at least one, as in CLIPRD_QUEUES=default")
        if self.heartbeat_seconds * 2 > self.lease_seconds:
            raise ValueError("heartbeat_seconds must be at most half of lease_seconds, or one missed heartbeat loses the job")
        if self.webhook_urls:
            _check_webhooks(self.webhook_urls, self.webhook_secret)
        return self


def _check_webhooks(urls: tuple[str, ...], secret: SecretStr | None) -> None:
    for url in urls:
        if not url.startswith(("http://", "https://")):
            raise ValueError(f"webhook_urls: {url!r} is no address; write it as https://HOST/PATH")
    encoded = "" if secret is None else secret.get_secret_value()
    try:
        num_bytes = len(base64.b64decode(encoded.removeprefix("whsec_"), validate=True))
    except ValueError:
        num_bytes = 0
    if not encoded.startswith("whsec_") or not MIN_SECRET_BYTES <= num_bytes <= MAX_SECRET_BYTES:
        raise ValueError(
            "webhook_secret: webhooks need one to be signed with; make it with"
            """ `python -c "import base64, os; print('whsec_' + base64.b64encode(os.urandom(32)).decode())"`"""
        )
