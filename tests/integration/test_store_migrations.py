"""Migrations: complete, repeatable, and safe when several processes run them at once."""

from __future__ import annotations

import subprocess
import sys

import pytest
from alembic.autogenerate import compare_metadata
from alembic.operations import Operations
from alembic.runtime.migration import MigrationContext
from sqlalchemy import Engine, text
from sqlalchemy.exc import IntegrityError

from service.store.metrics import measured_after
from service.store.migrations.versions import v0008_metric_steps
from service.store.models import Base
from service.store.session import is_migrated, make_engine, migrate
from tests.store_helpers import Sessions, create, read


def test_migrations_make_exactly_the_models_tables(engine: Engine) -> None:
    with engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, Base.metadata) == []


def test_migrating_again_keeps_everything(sessions: Sessions, engine: Engine, database_url: str) -> None:
    job = create(sessions)
    migrate(database_url)
    assert read(sessions, job.id).name == job.name
    with engine.connect() as connection:
        assert is_migrated(connection)


def test_an_older_database_keeps_its_rows(database_url: str) -> None:
    """From the first version on: what refers to a table that is made anew must not go with the old one."""
    engine = make_engine(database_url)
    migrate(database_url, "0001")
    insert_job = text(
        "INSERT INTO jobs (id, name, recipe, state, spec, queue, attempt, num_releases, max_attempts, created_at, teacher_job_id)"
        " VALUES (:id, 'old', 'clip', 'waiting', '{}', 'default', 0, 0, 3, '2026-01-01 00:00:00', :teacher)"
    )
    with engine.begin() as connection:
        for job_id, teacher in (("teacher-1", None), ("student-1", "teacher-1")):
            connection.execute(insert_job, {"id": job_id, "teacher": teacher})
            connection.execute(text("INSERT INTO job_labels VALUES (:id, 'team', 'vision')"), {"id": job_id})
    migrate(database_url)
    with engine.connect() as connection:
        assert is_migrated(connection)
        assert connection.execute(text("SELECT job_id, teacher_job_id FROM job_teachers")).all() == [("student-1", "teacher-1")]
        assert connection.execute(text("SELECT count(*) FROM job_labels")).scalar_one() == 2
        assert set(connection.execute(text("SELECT id FROM jobs")).scalars()) == {"teacher-1", "student-1"}
    with pytest.raises(IntegrityError), engine.begin() as connection:
        connection.execute(text("INSERT INTO job_labels VALUES ('nobody', 'team', 'vision')"))
    engine.dispose()


def test_metrics_of_an_older_database_are_streamed(sessions: Sessions, engine: Engine) -> None:
    """Migration 0008 on rows that are there already."""
    job = create(sessions)
    with engine.begin() as connection:
        rows = [{"id": job.id, "name": name, "step": step} for name in ("train/loss", "train/lr") for step in (0, 5, 9)]
        connection.execute(text("INSERT INTO metrics (job_id, name, step, attempt, value) VALUES (:id, :name, :step, 1, 0.5)"), rows)
        connection.execute(text("UPDATE jobs SET metrics = '{\"train/loss\": 0.5}'"))
        connection.execute(text("DROP TABLE metric_steps"))
        context = MigrationContext.configure(connection)
        with Operations.context(context):
            v0008_metric_steps.upgrade()
        assert compare_metadata(context, Base.metadata) == []
    with sessions() as session:
        found, _ = measured_after(session=session, job_id=job.id, names=["*"], after=0, limit=10)
    assert [(one.step, one.values) for one in found] == [(step, {"train/loss": 0.5}) for step in (0, 5, 9)]


def test_idempotency_keys_of_an_older_database_outlive_their_jobs(database_url: str) -> None:
    """Migration 0009 takes a constraint away that has no name on SQLite."""
    migrate(database_url, "0008")
    engine = make_engine(database_url)
    insert_job = text(
        "INSERT INTO jobs (id, name, recipe, state, spec, queue, priority, seconds_run, attempt, num_releases, max_attempts, created_at)"
        " VALUES ('job-1', 'old', 'clip', 'failed', '{}', 'default', 0, 0, 0, 0, 3, '2026-01-01 00:00:00')"
    )
    with engine.begin() as connection:
        connection.execute(insert_job)
        connection.execute(text("INSERT INTO idempotency_keys VALUES ('key', 'digest', 'job-1', '2026-01-01 00:00:00')"))
    migrate(database_url)
    with engine.begin() as connection:
        connection.execute(text("DELETE FROM jobs"))
        assert connection.execute(text("SELECT key, body_sha256, job_id FROM idempotency_keys")).all() == [("key", "digest", "job-1")]
    engine.dispose()


def test_an_empty_database_is_not_migrated(database_url: str) -> None:
    engine = make_engine(database_url)
    with engine.connect() as connection:
        assert not is_migrated(connection)
    engine.dispose()


def test_several_processes_may_migrate_at_once(database_url: str) -> None:
    code = f"from service.store.session import migrate; input(); migrate({database_url!r})"
    processes = [subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stderr=subprocess.PIPE) for _ in range(4)]
    for process in processes:
        assert process.stdin is not None
        process.stdin.write(b"\n")
        process.stdin.flush()
    for process in processes:
        _, errors = process.communicate(timeout=200)
        assert process.returncode == 0, errors.decode()
    engine = make_engine(database_url)
    with engine.connect() as connection:
        assert is_migrated(connection)
        assert connection.execute(text("SELECT count(*) FROM alembic_version")).scalar_one() == 1
    engine.dispose()


@pytest.mark.parametrize("url", ["sqlite://", "sqlite:///:memory:", "mysql://root@localhost/x"])
def test_other_databases_are_refused_with_a_remedy(url: str) -> None:
    with pytest.raises(ValueError, match=r"database_url: .*(use sqlite|name a file)"):
        make_engine(url)
