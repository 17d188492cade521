"""Fixtures that need real services: a Redis, a PostgreSQL, a migrated database of either kind, and the API on top.

The servers start once per test session, when a test first asks for them, and end with it, also when tests fail.
"""

from __future__ import annotations

import os

# Before torch loads, here and in the processes that tests start: with other numbers of threads sums are of other bits, models as small
# as the tests' gain nothing from threads, and two test processes with a thread per core each would wait for each other all the time.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ.pop("COLUMNS", None)  # pytest-xdist sets it, and a rich console keeps for good the width that it finds when it is made

from collections.abc import Iterator
from pathlib import Path

import pytest
from fastapi.testclient import TestClient
from hypothesis import HealthCheck
from hypothesis import settings as hypothesis_settings
from sqlalchemy import Engine
from sqlalchemy.orm import Session, sessionmaker

from service.settings import Settings
from service.store.session import make_engine, make_sessions, migrate
from tests.postgres_server import PostgresServer
from tests.redis_server import RedisServer

# No time that an example takes is a fault on a machine that may be busy; and the same code is given the same examples each time, but for
# whoever wants others (`pytest --hypothesis-profile=anew`).
hypothesis_settings.register_profile("tests", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
hypothesis_settings.register_profile("anew", hypothesis_settings.get_profile("tests"), derandomize=False)
hypothesis_settings.load_profile("tests")


@pytest.fixture(scope="session")
def redis_url() -> Iterator[str]:
    """A Redis of our own."""
    with RedisServer() as server:
        yield server.url


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[PostgresServer]:
    """A PostgreSQL of our own."""
    with PostgresServer() as server:
        server.forgo_durability()
        yield server


@pytest.fixture
def postgres_url(postgres_server: PostgresServer) -> Iterator[str]:
    """URL of an empty database of its own for each test."""
    with postgres_server.database() as url:
        yield url


@pytest.fixture(params=["sqlite", "postgres"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """URL of an empty database, once SQLite and once PostgreSQL."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'cliprd.db'}"
    url: str = request.getfixturevalue("postgres_url")
    return url


@pytest.fixture
def engine(database_url: str) -> Iterator[Engine]:
    """An engine on a migrated database of either kind."""
    migrate(database_url)
    engine = make_engine(database_url)
    yield engine
    engine.dispose()


@pytest.fixture
def sessions(engine: Engine) -> sessionmaker[Session]:
    """Sessions on a migrated database of either kind."""
    return make_sessions(engine)


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    """Settings that need no service: SQLite, a broker in memory, everything under `tmp_path`."""
    return Settings(
        database_url=f"sqlite:///{tmp_path / 'cliprd.db'}",
        broker_url="memory://",
        artifacts_root=tmp_path / "artifacts",
        teacher_store_root=tmp_path / "teacher-stores",
        data_root=tmp_path,
    )


@pytest.fixture
def patient_readiness(monkeypatch: pytest.MonkeyPatch) -> None:
    """`/readyz` waits for its parts however slow the machine is: none of them hangs."""
    monkeypatch.setattr("service.readiness.LIMIT_SECONDS", 60.0)


@pytest.fixture
def client(settings: Settings) -> Iterator[TestClient]:
    """The API of `settings`; an exception inside it becomes the 500 that a real client would see."""
    from service.app import create_app
    from tests.store_helpers import local_client

    with local_client(create_app(settings), raise_server_exceptions=False) as client:
        yield client


@pytest.fixture
def api_sessions(client: TestClient) -> sessionmaker[Session]:
    """The database of the running `client`."""
    sessions: sessionmaker[Session] = client.app.state.services.sessions  # type: ignore[attr-defined]
    return sessions
