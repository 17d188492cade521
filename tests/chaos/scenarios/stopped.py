"""Workers that are told to stop, or that stop for a while without knowing it."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable

from sqlalchemy import text
from sqlalchemy.orm import Session, sessionmaker

from cliprd_core.run_dir import EvaluationRecord
from service.store import jobs
from service.store.artifacts import register_artifacts, remove_artifacts
from service.store.blobs import StoredBlob
from service.store.kinds import ArtifactKind
from service.store.logs import append_log
from service.store.session import make_engine, make_sessions, reading
from tests.chaos.lab import Lab
from tests.chaos.scenario import scenario
from tests.live import eventually
from tests.store_helpers import SUCCESS

TOLD_TABLES = ("job_events", "log_chunks", "metrics", "metric_steps", "evaluations", "artifacts")


@scenario("worker-sigterm", "SIGTERM of a worker; the other one has run directories of its own, as on another machine", are_apart=True)
def worker_sigterm(lab: Lab) -> str:
    job_id = lab.train_to_checkpoint()
    holder = lab.holder(job_id)
    holder.process.send_signal(signal.SIGTERM)
    exit_code = holder.process.wait(timeout=30)
    lab.struck(job_id)
    assert exit_code == 0, f"the worker ended with exit code {exit_code}"
    assert lab.finish(job_id).attempt == 2
    steps = [record.step for record in lab.records(job_id)]
    assert steps == list(range(1, len(steps) + 1)), "it saved a checkpoint when it stopped, so no step is trained twice"
    return "no step trained twice"


@scenario("worker-stopped-past-lease", "SIGSTOP of a worker's parent and child until another has the job, then SIGCONT")
def worker_stopped(lab: Lab) -> str:
    job_id = lab.train_to_checkpoint()
    holder = lab.holder(job_id)
    engine = make_engine(lab.stack.database_url)
    sessions = make_sessions(engine)
    token = lease_token(sessions, job_id)
    holder.signal(signal.SIGSTOP)
    lab.struck(job_id)
    watch_writes(sessions)
    try:
        lab.wait_for_attempt(job_id, 2)
        lab.wait_for_training(job_id, attempt=2)
        num_refused = write_as_before(lab, sessions, job_id, token)
    finally:
        holder.signal(signal.SIGCONT)
    eventually(lambda: b"lost its lease and is stopped" in holder.child.log_path.read_bytes() or None)
    assert lab.finish(job_id).attempt == 2
    by_writer = written(sessions, job_id)
    engine.dispose()
    assert by_writer.get(lab.other(holder).name), "the triggers see nothing"
    assert holder.name not in by_writer, f"the worker that woke up wrote to {by_writer[holder.name]}"
    return f"{num_refused} kinds of late writes refused; the worker that woke up wrote nothing"


def watch_writes(sessions: sessionmaker[Session]) -> None:
    """From now on PostgreSQL notes who writes to what is told of a job."""
    with sessions.begin() as session:
        session.execute(text("CREATE TABLE written (job_id text, table_name text, writer text)"))
        insert = "INSERT INTO written VALUES (NEW.job_id, TG_TABLE_NAME, current_setting('application_name'))"
        body = f"$$ BEGIN {insert}; RETURN NULL; END $$"
        session.execute(text(f"CREATE FUNCTION note_writer() RETURNS trigger LANGUAGE plpgsql AS {body}"))
        for table in TOLD_TABLES:
            session.execute(
                text(f"CREATE TRIGGER note_writer AFTER INSERT OR UPDATE ON {table} FOR EACH ROW EXECUTE FUNCTION note_writer()")
            )


def written(sessions: sessionmaker[Session], job_id: str) -> dict[str, set[str]]:
    """The tables that each writer has written to, of a job."""
    with reading(sessions) as session:
        rows = session.execute(text("SELECT DISTINCT writer, table_name FROM written WHERE job_id = :job_id"), {"job_id": job_id})
        by_writer: dict[str, set[str]] = {}
        for writer, table in rows:
            by_writer.setdefault(writer, set()).add(table)
        return by_writer


def lease_token(sessions: sessionmaker[Session], job_id: str) -> str:
    with reading(sessions) as session:
        token = jobs.get_job(session=session, job_id=job_id).lease_token
    assert token is not None, "a job that trains is held"
    return token


def write_as_before(lab: Lab, sessions: sessionmaker[Session], job_id: str, token: str) -> int:
    """Everything a worker may write, with the token of the attempt that lost its lease: as if it woke up in the middle of it.

    Returns:
        How many kinds of writes were tried, all of which were refused.
    """
    late = {"job_id": job_id, "lease_token": token}
    records = [record.model_copy(update={"step": 10**6, "attempt": 1}) for record in lab.records(job_id)[:1]]
    evaluation = EvaluationRecord(
        attempt=1, step=10**6, epoch=1, time=time.time(), task="retrieval", dataset="late", num_samples=1, metrics={}, chance={}
    )
    blob = StoredBlob(key="late/late", num_bytes=1, sha256="0" * 64)
    writes: list[Callable[[Session], object]] = [
        lambda session: jobs.mark_started(session=session, **late),
        lambda session: jobs.record_checkpoint(session=session, step=10**6, **late),
        lambda session: jobs.record_metrics(session=session, records=records, **late),
        lambda session: jobs.record_evaluations(session=session, records=[evaluation], **late),
        lambda session: append_log(session=session, text="late", **late),
        lambda session: register_artifacts(session=session, kind=ArtifactKind.MODEL, group="late", files={"late": blob}, **late),
        lambda session: remove_artifacts(session=session, kind=ArtifactKind.CHECKPOINT, keep_groups=[], **late),
        lambda session: jobs.release_job(session=session, **late),
        lambda session: jobs.finish_job(session=session, outcome=SUCCESS, **late),
    ]
    for number, write in enumerate(writes):
        try:
            with sessions.begin() as session:
                write(session)
        except jobs.LeaseLostError:
            continue
        raise AssertionError(f"late write {number} was accepted")
    with sessions.begin() as session:
        assert not jobs.renew_lease(session=session, lease_seconds=60, **late), "a lost lease was renewed"
    return len(writes) + 1
