"""Workers in the store, on SQLite and PostgreSQL."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from service.store.models import Worker
from service.store.session import database_now, reading
from service.store.states import JobState
from service.store.workers import (
    FORGET_AFTER,
    WorkerState,
    WorkerStatus,
    complaint_about_queue,
    forget_workers,
    list_workers,
    remove_worker,
)
from tests.store_helpers import Sessions, claim, create, finish, gpu, report


def workers(sessions: Sessions) -> list[WorkerStatus]:
    with reading(sessions) as session:
        return list_workers(session=session)


def shift(sessions: Sessions, worker_id: str, **changes: Any) -> None:
    with sessions.begin() as session:
        session.get_one(Worker, worker_id).expires_at = database_now(session) + timedelta(**changes)


def test_a_worker_is_as_it_reported_last(sessions: Sessions) -> None:
    assert workers(sessions) == []
    report(sessions, "worker-1", queues=("default", "h100"))
    (first,) = workers(sessions)
    assert (first.id, first.host, first.state, first.queues) == ("worker-1", "machine", WorkerState.CONSUMING, ["default", "h100"])
    assert (first.problems, first.job_id, first.gpus) == ([], None, [])
    report(sessions, "worker-1", problems=("broker: away",), gpus=(gpu(),))
    (second,) = workers(sessions)
    assert (second.state, second.problems, second.gpus) == (WorkerState.NOT_CONSUMING, ["broker: away"], [gpu()])
    assert second.started_at == first.started_at
    assert second.heartbeat_at > first.heartbeat_at
    with sessions.begin() as session:
        remove_worker(session=session, worker_id="worker-1")
    assert workers(sessions) == []


def test_one_that_reports_no_more_is_lost_and_forgotten_after_some_time(sessions: Sessions) -> None:
    report(sessions, "worker-1")
    report(sessions, "worker-2", problems=("broker: away",))
    shift(sessions, "worker-2", seconds=-1)
    assert {worker.id: worker.state for worker in workers(sessions)} == {"worker-1": "consuming", "worker-2": "lost"}
    shift(sessions, "worker-1", seconds=-FORGET_AFTER.total_seconds() - 1)
    with sessions.begin() as session:
        forget_workers(session=session)
    assert [worker.id for worker in workers(sessions)] == ["worker-2"]
    report(sessions, "worker-2")
    assert workers(sessions)[0].state is WorkerState.CONSUMING, "it was only away"


def test_it_works_on_the_job_that_it_claimed(sessions: Sessions) -> None:
    for name in ("worker-1", "worker-2"):
        report(sessions, name)
    held = claim(sessions, create(sessions).id, worker="worker-2")
    assert [worker.job_id for worker in workers(sessions)] == [None, held.job.id]
    finish(sessions, held)
    assert [worker.job_id for worker in workers(sessions)] == [None, None]


def test_a_queue_that_no_worker_takes_is_complained_about(sessions: Sessions) -> None:
    def complaint(queue: str) -> str | None:
        with reading(sessions) as session:
            return complaint_about_queue(session=session, queue=queue)

    assert complaint("h100") == "no worker takes queue 'h100'"
    report(sessions, "worker-1", queues=("default",))
    assert complaint("default") is None
    assert complaint("h100") == "no worker takes queue 'h100'"
    report(sessions, "worker-2", queues=("h100",), problems=("broker: away",))
    assert complaint("h100") == "no worker takes queue 'h100' now: GET /workers says what keeps those that should"
    shift(sessions, "worker-2", seconds=-1)
    assert complaint("h100") == "no worker takes queue 'h100'"
    report(sessions, "worker-3", queues=("h100",))
    assert claim(sessions, create(sessions).id, worker="worker-3").job.state is JobState.RUNNING
    assert complaint("h100") is None, "it will, when it is done"
