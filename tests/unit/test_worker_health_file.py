"""The health file and its reader, and the checks that need no broker."""

from __future__ import annotations

import json
import re
import sys
import threading
import time
from pathlib import Path
from queue import Empty
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from sqlalchemy import text

from service.store.jobs import release_job
from service.store.session import make_engine, make_sessions, migrate, reading
from service.store.workers import WorkerState, holds_a_job, list_workers
from tests.store_helpers import claim, create
from worker import child_watch, consumer_watch, health, rounds
from worker import heartbeat as heartbeat_module
from worker.boot_clock import now
from worker.child_watch import JOBLESS_SECONDS, ChildWatch
from worker.consumer_watch import SILENCE_SECONDS, ConsumerWatch, LostAcknowledgementError
from worker.health import HEALTH_FILE_VARIABLE, RESTART_SECONDS, Health
from worker.heartbeat import ARTIFACTS_SECONDS, Heartbeat
from worker.rounds import Rounds
from worker.settings import WorkerSettings


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "health.json"
    monkeypatch.setenv(HEALTH_FILE_VARIABLE, str(path))
    return path


def probe(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    monkeypatch.setattr(sys, "argv", ["health", *arguments])
    code = health.main()
    (line,) = capsys.readouterr().out.splitlines()
    return code, line


def test_the_reader_says_what_is_wrong(file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    code, line = probe(monkeypatch, capsys)
    assert code == 1
    assert "no worker has written" in line
    at = now()
    Health(at, at + 60, (), is_stuck=False).write(file)
    assert probe(monkeypatch, capsys) == (0, "ready")
    Health(at, at + 60, ("broker: away", "database: away"), is_stuck=False).write(file)
    assert probe(monkeypatch, capsys) == (1, "broker: away; database: away")
    assert probe(monkeypatch, capsys, "--live") == (0, "live")
    Health(at, at + 60, ("deaf",), is_stuck=True).write(file)
    assert probe(monkeypatch, capsys, "--live") == (1, "deaf")
    file.write_text(json.dumps({"problems": []}))
    assert "not what a worker of this version writes" in probe(monkeypatch, capsys)[1]
    monkeypatch.delenv(HEALTH_FILE_VARIABLE)
    assert "is not set" in probe(monkeypatch, capsys)[1]


def test_what_a_worker_said_expires_and_a_restart_is_due_some_time_after(
    file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    at = now()
    monkeypatch.setattr(health, "now", lambda: at)
    Health(at - 20, at - 1, (), is_stuck=False).write(file)
    assert probe(monkeypatch, capsys) == (1, "the worker has not reported for 20 s: it hangs, was stopped, or is gone")
    assert probe(monkeypatch, capsys, "--live") == (0, "live")
    Health(at - 90, at - RESTART_SECONDS - 1, (), is_stuck=False).write(file)
    assert probe(monkeypatch, capsys, "--live")[0] == 1
    Health(at + 3600, at + 3660, (), is_stuck=False).write(file)
    assert probe(monkeypatch, capsys) == (1, "the worker has not reported since this machine was started again")


class Channel:
    """What the watch needs of kombu's channel; `answers` are what reading finds."""

    def __init__(self) -> None:
        self.is_free = True
        self.qos = SimpleNamespace(can_consume=lambda: self.is_free)
        self.handlers: dict[str, Any] = {"BRPOP": self._read}
        self.answers: list[Any] = []

    def _read(self) -> Any:
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer


class Clock:
    """What a module takes for the time."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, module: ModuleType) -> None:
        self.now = 1000.0
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: self.now, time=lambda: self.now))


def test_the_watch_tells_a_deaf_consumer_from_a_busy_one(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, channel, watch = Clock(monkeypatch, consumer_watch), Channel(), ConsumerWatch(["default"])
    consumer = SimpleNamespace(channel=channel, consuming_from=lambda _: True)
    assert watch.problem() == "it is not connected to the broker"
    watch.connected(channel)
    watch.look(consumer)
    assert watch.problem() == "the broker has not answered it yet"
    channel.answers = [Empty(), ConnectionError(), True]
    with pytest.raises(Empty):
        channel.handlers["BRPOP"]()
    assert watch.problem() is None
    clock.now += SILENCE_SECONDS + 1
    watch.look(consumer)
    with pytest.raises(ConnectionError):
        channel.handlers["BRPOP"]()
    assert watch.problem() == f"it has had no answer from the broker for {SILENCE_SECONDS + 1:.0f} s"
    assert channel.handlers["BRPOP"]()
    assert watch.problem() is None
    channel.is_free = False
    monkeypatch.setattr(consumer_watch.state, "reserved_requests", [SimpleNamespace(id="its message")])
    clock.now += 100 * SILENCE_SECONDS
    assert watch.problem() == f"its event loop has not run for {100 * SILENCE_SECONDS:.0f} s"
    watch.look(consumer)
    assert watch.problem() is None, "busy"
    watch.disconnected()
    assert watch.problem() == "it is not connected to the broker"
    watch.is_shutting_down = True
    assert watch.problem() == "it is shutting down"


def test_a_consumer_that_is_full_without_a_message_needs_a_new_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, channel, watch = Clock(monkeypatch, consumer_watch), Channel(), ConsumerWatch(["default"])
    consumer = SimpleNamespace(channel=channel, consuming_from=lambda _: True)
    reserved: list[Any] = []
    monkeypatch.setattr(consumer_watch.state, "reserved_requests", reserved)
    watch.connected(channel)
    channel.answers = [True]
    channel.handlers["BRPOP"]()
    channel.is_free = False
    watch.look(consumer)  # the message may just have come
    reserved.append(SimpleNamespace(id="its message"))
    watch.look(consumer)
    reserved.clear()
    watch.look(consumer)  # or just have been done
    clock.now += SILENCE_SECONDS + 1
    with pytest.raises(LostAcknowledgementError):
        watch.look(consumer)
    assert watch.problem() == f"it has had no answer from the broker for {SILENCE_SECONDS + 1:.0f} s", "until the new connection is there"
    watch.connected(channel)
    watch.look(consumer)
    watch.is_shutting_down = True
    watch.look(consumer)


def test_a_child_with_a_message_and_no_job_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, child = Clock(monkeypatch, child_watch), ChildWatch()
    for message, holds_job, is_new in ((None, False, False), ("first", True, False), ("first", False, True), ("second", False, True)):
        for seconds in (0.0, JOBLESS_SECONDS, 1.0):
            clock.now += seconds
            problem = child.look(message, holds_job=holds_job)
            assert (problem is not None) == (is_new and seconds == 1.0), (message, seconds)
    assert problem == f"its child process hangs: for {JOBLESS_SECONDS + 1:.0f} s it has had a message and held no job; restart the worker"
    assert child.look("second", holds_job=True) is None


def test_only_a_running_job_of_its_own_under_a_live_lease_is_held_by_a_worker(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'cliprd.db'}"
    migrate(url)
    engine = make_engine(url)
    sessions = make_sessions(engine)

    def holds(worker: str) -> bool:
        with reading(sessions) as session:
            return holds_a_job(session=session, worker_id=worker)

    assert not holds("w")
    claimed = claim(sessions, create(sessions).id, "w")
    assert (holds("w"), holds("v")) == (True, False)
    claim(sessions, create(sessions).id, "late", lease_seconds=-1)
    assert not holds("late")
    with sessions.begin() as session:
        release_job(session=session, job_id=claimed.job.id, lease_token=claimed.lease_token)
    assert not holds("w")
    engine.dispose()


@pytest.fixture
def heartbeat(tmp_path: Path) -> Heartbeat:
    url = f"sqlite:///{tmp_path / 'cliprd.db'}"
    settings = WorkerSettings(
        database_url=url, broker_url="memory://", health_file=tmp_path / "health.json", artifacts_root=tmp_path / "artifacts"
    )
    return Heartbeat(settings, ConsumerWatch(["default"]), "worker-1")


def test_the_database_must_have_this_versions_schema(heartbeat: Heartbeat, tmp_path: Path) -> None:
    heartbeat.beat()
    assert [problem for problem in Health.read(tmp_path / "health.json").problems if "schema" in problem]
    migrate(f"sqlite:///{tmp_path / 'cliprd.db'}")
    heartbeat.beat()
    (problem,) = Health.read(tmp_path / "health.json").problems
    assert problem == "the worker does not take jobs: it is not connected to the broker"
    engine = make_engine(f"sqlite:///{tmp_path / 'cliprd.db'}")
    with engine.begin() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = 'of a later version'"))
    heartbeat.beat()
    with reading(make_sessions(engine)) as session:
        (worker,) = list_workers(session=session)
    engine.dispose()
    assert worker.state is WorkerState.NOT_CONSUMING, "not lost: it reports as well as it can"
    assert "schema" in worker.problems[-1]


def test_rounds_that_do_not_end_are_told_to_probes_but_keep_the_worker_from_no_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url = f"sqlite:///{tmp_path / 'cliprd.db'}"
    migrate(url)
    settings = WorkerSettings(database_url=url, broker_url="memory://", health_file=tmp_path / "health.json")
    hangs, may_end = threading.Event(), threading.Event()

    def work() -> None:
        hangs.set()
        with reaper.forks_allowed():
            may_end.wait(60)

    reaper = Rounds("reaper", work, pause_seconds=0.01)
    heartbeat = Heartbeat(settings, ConsumerWatch(["default"]), "worker-1", [reaper])

    def problems() -> tuple[str, ...]:
        heartbeat.beat()
        return Health.read(tmp_path / "health.json").problems[1:]  # the first one: there is no consumer

    assert problems() == (), "it has not begun"
    reaper.start()
    try:
        assert hangs.wait(30)
        assert problems() == ()
        clock = Clock(monkeypatch, rounds)
        clock.now = time.monotonic() + rounds.OVERDUE_SECONDS + 5
        (problem,) = problems()
        assert re.fullmatch("reaper: no round has ended for [0-9]+ s", problem)
        engine = make_engine(url)
        with reading(make_sessions(engine)) as session:
            (worker,) = list_workers(session=session)
        engine.dispose()
        assert len(worker.problems) == 1
    finally:
        monkeypatch.undo()
        may_end.set()
        reaper.stop()


def test_only_a_worker_that_does_not_consume_for_long_for_no_reason_outside_it_is_stuck(
    heartbeat: Heartbeat, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(monkeypatch, heartbeat_module)

    def is_stuck() -> bool:
        heartbeat.beat()
        return Health.read(tmp_path / "health.json").is_stuck

    assert not is_stuck()
    clock.now += RESTART_SECONDS + 1
    assert not is_stuck(), "the database has no tables, which keeps the worker from working"
    migrate(f"sqlite:///{tmp_path / 'cliprd.db'}")
    assert not is_stuck(), "only just"
    clock.now += RESTART_SECONDS + 1
    assert is_stuck()


def test_an_artifact_store_that_takes_nothing_makes_the_worker_unready(
    heartbeat: Heartbeat, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(monkeypatch, heartbeat_module)
    database_url, store = f"sqlite:///{tmp_path / 'cliprd.db'}", tmp_path / "artifacts"
    migrate(database_url)

    def problems() -> list[str]:
        heartbeat.beat()
        written = list(Health.read(tmp_path / "health.json").problems)
        engine = make_engine(database_url)
        with reading(make_sessions(engine)) as session:
            (worker,) = list_workers(session=session)
        engine.dispose()
        assert worker.problems == written
        return [problem for problem in written if "artifact store" in problem]

    store.write_text("no folder")
    assert problems() == [f"artifact store: [Errno 17] File exists: '{store}'"]
    store.unlink()
    assert problems() == [], "looked at again at once"
    store.rmdir()
    store.write_text("no folder")
    assert problems() == [], "a while ago it was well"
    clock.now += ARTIFACTS_SECONDS + 1
    assert len(problems()) == 1
