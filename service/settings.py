"""Settings of the API, read from environment variables that begin with `CLIPRD_`.

`CLIPRD_DATABASE_URL=postgresql://cliprd@db/cliprd` sets `database_url`, and so on; `CLIPRD_DATABASE_URL_FILE=/run/secrets/url` names a file
to read it from (`service/environment.py`). A worker has settings of its own (`worker/settings.py`); what both need has the same name there.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import BeforeValidator, Field
from pydantic_settings import NoDecode

from cliprd_core.locations import Locations, split_hosts, split_roots
from service.environment import EnvironmentSettings
from service.logs import LogFormat
from service.store.failure_policy import DEFAULT_MAX_ATTEMPTS

Roots = Annotated[tuple[Path, ...], NoDecode, BeforeValidator(lambda value: split_roots(value) if isinstance(value, str) else value)]
Hosts = Annotated[tuple[str, ...], NoDecode, BeforeValidator(lambda value: split_hosts(value) if isinstance(value, str) else value)]


class Settings(EnvironmentSettings):
    """What the API needs to know of its surroundings. The defaults keep everything under `.cliprd` of the current directory."""

    database_url: str = Field(
        default="sqlite:///.cliprd/cliprd.db",
        description="`sqlite:///FILE` for one machine, `postgresql://USER:PASSWORD@HOST/DATABASE` for several; libpq's parameters may"
        " follow and override ours, as in `?tcp_user_timeout=60000` (milliseconds until a silent server is given up; ours is 25000).",
    )
    broker_url: str = Field(default="redis://127.0.0.1:6379/0", description="Celery broker that carries the jobs' messages to the workers.")
    artifacts_root: Path = Field(
        default=Path(".cliprd/artifacts"), description="Folder of the artifacts' bytes; the API and all workers see the same one."
    )
    artifacts_url: str = Field(
        default="", description="`s3://BUCKET/PREFIX`: keep the artifacts' bytes there (extra `s3`). Empty: in `artifacts_root`."
    )
    teacher_store_root: Path = Field(
        default=Path(".cliprd/teacher-stores"),
        description="Folder of the teacher stores, as the workers'. The API lists and deletes those it can see there.",
    )
    home: Path = Field(
        default=Path(".cliprd"),
        description="Folder of the service's own files: jobs read nothing of it as data, also where it lies in one of `data_roots`. With"
        " `cliprd up`: where everything is kept.",
    )
    data_root: Path = Field(default=Path(), description="Folder that relative paths in specs start from. Default: the current directory.")

    data_roots: Roots = Field(
        default=(), description="Folders that jobs may read data and checkpoints from, separated by `:`. None: `data_root` alone."
    )
    remote_hosts: Hosts = Field(
        default=(),
        description="What jobs may read shards from beside local folders: `HOST`, `HOST:PORT` or `s3://BUCKET`, separated by commas;"
        " `*`: anything.",
    )

    host: str = Field(default="127.0.0.1", description="Address that the API listens on.")
    port: int = Field(default=8000, ge=0, le=65_535, description="Port that the API listens on; 0: any free one.")

    always_need_key: bool = Field(
        default=False,
        description="Before the first API key is made, refuse this machine's own requests, too. For containers, whose requests may come"
        " from anyone, and look local or like a gateway's.",
    )
    check_files: bool = Field(
        default=True,
        description="Look at the files a spec names when it is submitted. Turn off where the API doesn't see the workers' files.",
    )
    log_format: LogFormat = Field(default=LogFormat.TEXT, description="`json`: one object a line, with job id and attempt.")
    metrics_need_key: bool = Field(
        default=True, description="Whether `/metrics` needs an API key like all routes; false: anyone who reaches the service may read it."
    )
    api_processes: int = Field(
        default=1,
        ge=1,
        le=64,
        description="Processes that answer requests on the one port (`python -m service`). One uses one core. Only with PostgreSQL"
        " more are faster; each has database connections and event streams of its own.",
    )
    migrate_on_start: bool = Field(default=True, description="Bring the database to the newest schema when the API starts.")
    max_body_bytes: int = Field(default=1_000_000, ge=1_000, description="A longer request body is refused (413).")
    max_header_bytes: int = Field(default=32_768, ge=4_096, description="A longer URL with header fields is refused (431).")
    max_attempts: int = Field(
        default=DEFAULT_MAX_ATTEMPTS,
        ge=1,
        description="Attempts of a job that may fail for a reason that may pass (a lost worker, a full disk) before the job fails;"
        " those before one that stored a checkpoint further on don't count.",
    )
    broker_timeout_seconds: float = Field(
        default=2.0, gt=0, description="A broker that doesn't answer for this long counts as down; the reaper re-sends."
    )
    max_streams: int = Field(default=100, ge=1, description="Event streams that one process keeps open; further ones are refused (503).")
    stream_poll_seconds: float = Field(default=1.0, gt=0, description="Pause between a stream's looks for news.")
    stream_heartbeat_seconds: int = Field(default=15, ge=1, description="Pause between heartbeats of a stream without news.")
    shutdown_seconds: int = Field(default=5, ge=1, description="From the order to stop to the end of requests that are still open.")

    @property
    def locations(self) -> Locations:
        """Where jobs may read from."""
        return Locations.of(self.data_roots or (self.data_root,), self.remote_hosts, home=self.home)
