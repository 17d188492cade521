"""Engines, sessions, migrations and the database's clock.

How transactions are used throughout: every store function takes `session` by keyword and never commits; its caller decides what
belongs together::

    with sessions.begin() as session:      # a write: all or nothing
        claim = claim_job(session=session, ...)
    with reading(sessions) as session:     # a read: never waits for a writer
        job = get_job(session=session, ...)
"""

from __future__ import annotations

import logging
import os
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, Engine, create_engine, event, func, select, text
from sqlalchemy.engine import URL, ExceptionContext, make_url
from sqlalchemy.exc import DBAPIError, InterfaceError, InternalError, OperationalError, TimeoutError
from sqlalchemy.orm import Session, sessionmaker

SQLITE_BUSY_TIMEOUT_SECONDS = 30
"""How long a SQLite writer waits for another one."""

IDLE_TRANSACTION_SECONDS = 10.0
"""How long PostgreSQL lets a transaction wait for its client's next statement: one that is frozen, or whose machine is gone without a word,
must not keep the lock of its job's row, or nobody could take the job over. Ours never wait for anything but the processor."""

POOL_TIMEOUT_SECONDS = 10.0
"""How long a caller waits for one of the process's connections while all are in use."""

POSTGRES_CONNECTION: dict[str, int] = {
    "connect_timeout": 5,
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 3,
    "tcp_user_timeout": 25_000,
}
"""libpq's parameters, which those in the database's URL override: seconds to wait for a connection, of silence before the server's machine
is asked for a sign of life, and between such questions; how many may go unanswered; milliseconds until what was sent must have arrived. A
server that is gone without a word is noticed so in about 25 seconds, well within a lease; TCP alone waits for a quarter of an hour, or
hours."""

OUT_OF_REACH = (OperationalError, InterfaceError, TimeoutError)
"""What a database raises that can't be used now; it may be well again soon. The last one: all connections of the process are in use."""

DEADLOCK = "40P01"
"""PostgreSQL's code of a transaction that it ended because two waited for each other; repeated, it finds the other one gone."""

READ_ONLY = "cliprd_read_only"
"""Execution option of a connection that will only read."""

_MIGRATION_LOCK_KEY = 0x636C69707264  # "cliprd": PostgreSQL's advisory locks are told apart by number
_alembic_lock = threading.Lock()  # alembic's environment is a global of the process


def make_engine(database_url: str) -> Engine:
    """An engine for `sqlite:///FILE` or `postgresql://…`.

    Raises:
        ValueError: for any other database, and for SQLite in memory, which several threads can't share.
    """
    url = _with_driver(make_url(database_url))
    pool: dict[str, Any] = {"pool_size": 10, "max_overflow": 20, "pool_timeout": POOL_TIMEOUT_SECONDS}
    if url.get_backend_name() == "postgresql":
        engine = create_engine(url, pool_pre_ping=True, connect_args=_connection_of(url), **pool)
        event.listen(engine, "connect", _on_postgres_connect)
        event.listen(engine, "handle_error", _on_postgres_error)
        return engine
    engine = create_engine(url, connect_args={"timeout": SQLITE_BUSY_TIMEOUT_SECONDS}, **pool)
    event.listen(engine, "connect", _on_sqlite_connect)
    event.listen(engine, "begin", _on_sqlite_begin)
    return engine


def make_sessions(engine: Engine) -> sessionmaker[Session]:
    """A factory of sessions whose objects stay readable after the commit."""
    return sessionmaker(engine, expire_on_commit=False)


def is_deadlock(error: Exception) -> bool:
    """Whether the transaction that the error ended may be repeated at once."""
    return isinstance(error, DBAPIError) and getattr(error.orig, "sqlstate", None) == DEADLOCK


@contextmanager
def reading(sessions: sessionmaker[Session]) -> Iterator[Session]:
    """A session for reading only: on SQLite it takes no write lock."""
    with sessions() as session:
        session.connection(execution_options={READ_ONLY: True})
        yield session


def database_now(session: Session) -> datetime:
    """The database's clock, so that leases don't depend on how well the machines' clocks agree."""
    if session.get_bind().dialect.name == "postgresql":
        now: datetime = session.execute(select(func.clock_timestamp())).scalar_one()
        return now.astimezone(UTC)
    return datetime.now(UTC)


def migrate(database_url: str, version: str = "head") -> None:
    """Bring the database to a version of the schema, the newest one by default.

    Several processes may do this at once: one migrates, the others wait and find it done.
    """
    url = _with_driver(make_url(database_url))
    is_sqlite = url.get_backend_name() == "sqlite"
    if is_sqlite:
        assert url.database
        Path(url.database).parent.mkdir(parents=True, exist_ok=True)
    engine = make_engine(database_url)
    try:
        if is_sqlite:
            event.listen(engine, "connect", _suspend_foreign_keys)
            _switch_to_wal(engine)
        with engine.begin() as connection:  # on SQLite this takes the write lock at once
            if not is_sqlite:
                connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _MIGRATION_LOCK_KEY})
            config = _alembic_config()
            config.attributes["connection"] = connection
            with _alembic_lock:
                command.upgrade(config, version)
    finally:
        engine.dispose()


def check_database(engine: Engine) -> None:
    """Can the service work with it?

    Raises:
        SQLAlchemyError: it does not answer.
        OSError: it can't be written, or has another schema.
    """
    with engine.connect().execution_options(**{READ_ONLY: True}) as connection:
        if not is_writable(connection):
            raise OSError("the database can only be read; after a failover, CLIPRD_DATABASE_URL may name what is now a standby")
        if not is_migrated(connection):
            raise OSError("the database does not have this version's schema; start the service with CLIPRD_MIGRATE_ON_START=true")


def is_migrated(connection: Connection) -> bool:
    """Whether the database has exactly this version's schema."""
    logging.getLogger("alembic.runtime.migration").setLevel(logging.WARNING)  # it tells the kind of database each time
    current = MigrationContext.configure(connection).get_current_heads()
    return set(current) == set(ScriptDirectory.from_config(_alembic_config()).get_heads())


def is_writable(connection: Connection) -> bool:
    """Whether transactions may write: a PostgreSQL standby, or a file of SQLite without the permission, can be read all the same."""
    if connection.dialect.name == "postgresql":
        return bool(connection.execute(text("SHOW transaction_read_only")).scalar_one() == "off")
    database = connection.engine.url.database
    assert database
    return os.access(database, os.W_OK)


def _with_driver(url: URL) -> URL:
    backend = url.get_backend_name()
    if backend in ("postgresql", "postgres"):
        return url.set(drivername="postgresql+psycopg")
    if backend != "sqlite":
        raise ValueError(f"database_url: {backend!r} is not supported; use sqlite:///FILE or postgresql://USER@HOST/DATABASE")
    if not url.database or url.database == ":memory:":
        raise ValueError(
            "database_url: SQLite in memory can't be shared between processes; name a file, as in sqlite:////var/lib/cliprd.db"
        )
    return url


def _connection_of(url: URL) -> dict[str, int]:
    return {name: value for name, value in POSTGRES_CONNECTION.items() if name not in url.query}


def _alembic_config() -> Config:
    config = Config()
    folder = Path(__file__).parent / "migrations"
    config.set_main_option("script_location", str(folder).replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    return config


def _on_postgres_connect(connection: Any, _record: Any) -> None:
    milliseconds = round(IDLE_TRANSACTION_SECONDS * 1000)
    connection.execute(f"SET idle_in_transaction_session_timeout = {milliseconds}")  # not as a startup option: poolers refuse those
    connection.commit()


def _on_postgres_error(context: ExceptionContext) -> None:
    """A transaction that was ended for being idle is a lost connection like any other, but its code makes it an internal error."""
    error = context.original_exception
    if context.is_disconnect and isinstance(context.sqlalchemy_exception, InternalError):
        raise OperationalError(context.statement, context.parameters, error, connection_invalidated=True) from error


def _on_sqlite_connect(connection: sqlite3.Connection, _record: Any) -> None:
    connection.isolation_level = None  # else the driver begins transactions of its own, too late for the lock we want
    connection.execute("PRAGMA foreign_keys = ON")


def _suspend_foreign_keys(connection: sqlite3.Connection, _record: Any) -> None:
    # SQLite changes a table by making it anew and dropping the old one; enforced, foreign keys would delete all rows that refer to it.
    connection.execute("PRAGMA foreign_keys = OFF")


def _on_sqlite_begin(connection: Connection) -> None:
    # A transaction that reads first and writes later may fail half-way, however long it waits; so a writer locks at its start.
    read_only = connection.get_execution_options().get(READ_ONLY, False)
    connection.exec_driver_sql("BEGIN" if read_only else "BEGIN IMMEDIATE")


def _switch_to_wal(engine: Engine) -> None:
    """Let readers and one writer work at the same time. The mode stays with the file; SQLite doesn't wait for the lock it needs here."""
    deadline = time.monotonic() + SQLITE_BUSY_TIMEOUT_SECONDS
    while True:
        raw = engine.raw_connection()
        try:
            raw.cursor().execute("PRAGMA journal_mode = WAL")
        except sqlite3.OperationalError as error:
            if "locked" not in str(error) or time.monotonic() > deadline:
                raise
            time.sleep(0.05)
        else:
            return
        finally:
            raw.close()
