"""What is told of jobs while they run, on SQLite and PostgreSQL: events, logs, steps."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import delete

from cliprd_core.run_dir import ErrorReason, ErrorRecord, MetricsRecord
from service.store import jobs, logs
from service.store.events import list_events
from service.store.failure_policy import what_to_do
from service.store.metrics import Measured, measured_after
from service.store.models import MetricStep
from service.store.session import database_now, reading
from tests.store_helpers import FAILURE, Sessions, claim, create, distilled_spec, evaluated, finish, measured


def told(sessions: Sessions, job_id: str, after: int = 0) -> list[str]:
    with reading(sessions) as session:
        return [event.kind.value for event in list_events(session=session, job_id=job_id, after=after)]


def lease_of(claimed: jobs.Claim) -> dict[str, Any]:
    return {"job_id": claimed.job.id, "lease_token": claimed.lease_token}


def test_a_long_life_is_told_in_order(sessions: Sessions) -> None:
    job = create(sessions, max_attempts=2)
    claimed = claim(sessions, job.id)
    with sessions.begin() as session:
        jobs.mark_started(session=session, **lease_of(claimed))
        jobs.record_checkpoint(session=session, **lease_of(claimed), step=5)
        for _ in range(2):  # a replay is not told again
            jobs.record_evaluations(session=session, **lease_of(claimed), records=[evaluated(5)])
        for _ in range(2):
            jobs.request_pause(session=session, job_id=job.id)
        jobs.release_job(session=session, **lease_of(claimed))
        for _ in range(2):
            jobs.resume_job(session=session, job_id=job.id)
    expected = ["created", "queued", "claimed", "started", "checkpoint", "evaluated", "pausing", "paused", "resumed", "queued"]
    assert told(sessions, job.id) == expected
    claimed = claim(sessions, job.id, worker="worker-2")
    with sessions.begin() as session:
        jobs.record_evaluations(session=session, **lease_of(claimed), records=[evaluated(5), evaluated(5, attempt=2)])
        jobs.requeue_expired(session=session, now=database_now(session) + timedelta(seconds=61))
    claimed = claim(sessions, job.id)
    with sessions.begin() as session:
        for _ in range(2):
            jobs.request_cancel(session=session, job_id=job.id)
    finish(sessions, claimed, jobs.Cancelled())
    with sessions.begin() as session:
        jobs.retry_job(session=session, job_id=job.id)
    finish(sessions, claim(sessions, job.id), FAILURE)
    expected += ["claimed", "evaluated", "lease_lost", "queued", "claimed", "cancel_requested", "cancelled", "retried", "queued", "claimed"]
    assert told(sessions, job.id) == [*expected, "failed"]
    with reading(sessions) as session:
        events = list_events(session=session, job_id=job.id)
    assert [event.id for event in events] == sorted({event.id for event in events})
    assert [event.data["worker"] for event in events if event.kind == "claimed"] == ["worker-1", "worker-2", "worker-1", "worker-1"]
    assert events[-1].data == {"reason": "diverged", "message": FAILURE.message, "what_to_do": what_to_do(FAILURE)}
    assert told(sessions, job.id, after=events[-2].id) == ["failed"]


@pytest.mark.parametrize(
    ("reason", "expected"),
    [
        (ErrorReason.WORKER_LOST, ["attempt_lost", "queued"]),
        (ErrorReason.DISK_FULL, ["attempt_lost", "queued"]),
        (ErrorReason.DIVERGED, ["failed"]),
    ],
)
def test_an_attempt_that_its_worker_gives_up_has_lost_no_lease(sessions: Sessions, reason: ErrorReason, expected: list[str]) -> None:
    job = create(sessions)
    finish(sessions, claim(sessions, job.id), ErrorRecord(reason=reason, message="it went wrong"))
    assert told(sessions, job.id) == ["created", "queued", "claimed", *expected]
    with reading(sessions) as session:
        event = list_events(session=session, job_id=job.id)[3]
    assert (event.data["reason"], event.data["message"]) == (reason, "it went wrong")
    assert event.kind != "attempt_lost" or event.data["worker"] == "worker-1"


def test_what_follows_from_a_lease_that_ran_out_says_how_often(sessions: Sessions) -> None:
    job = create(sessions, max_attempts=2)
    claim(sessions, job.id)
    with sessions.begin() as session:
        jobs.requeue_expired(session=session, now=database_now(session) + timedelta(seconds=61))
    with reading(sessions) as session:
        *_, lost, queued = list_events(session=session, job_id=job.id)
    assert (lost.kind, lost.data) == ("lease_lost", {"worker": "worker-1"})
    assert "lost attempt 1 of at most 2" in queued.data["message"]


def test_a_student_tells_of_its_waiting_and_of_its_teachers_end(sessions: Sessions) -> None:
    teacher = create(sessions)
    student = create(sessions, distilled_spec(teacher.id))
    finish(sessions, claim(sessions, teacher.id), FAILURE)
    assert told(sessions, student.id) == ["created", "waiting", "failed"]


def test_what_is_rolled_back_is_not_told(sessions: Sessions) -> None:
    job = create(sessions)
    with sessions() as session:
        jobs.request_pause(session=session, job_id=job.id)
        session.rollback()
    assert told(sessions, job.id) == ["created", "queued"]


def test_the_log_grows_over_attempts_and_has_a_tail(sessions: Sessions, monkeypatch: pytest.MonkeyPatch) -> None:
    job = create(sessions)
    chunks = ["one\ntwo\n", "thr\0ee\n", "four", "\nfive\nsix"]
    for chunk in chunks:
        claimed = claim(sessions, job.id)
        with sessions.begin() as session:
            logs.append_log(session=session, **lease_of(claimed), text=chunk)
            jobs.release_job(session=session, **lease_of(claimed))
    whole = "".join(chunks).replace("\0", "\ufffd")
    with reading(sessions) as session:
        assert logs.read_log(session=session, job_id=job.id) == (whole, len(whole))
        assert logs.read_log(session=session, job_id=job.id, after=5, limit=1) == (whole[5:8], 8)
        assert logs.read_log(session=session, job_id=job.id, after=len(whole)) == ("", len(whole))
        for num_lines in range(1, 9):
            start = logs.tail_start(session=session, job_id=job.id, num_lines=num_lines)
            assert whole[start:] == "\n".join(whole.split("\n")[-num_lines:])
    monkeypatch.setattr(logs, "MAX_LOG_CHARACTERS", 10)
    claimed = claim(sessions, job.id)
    with sessions.begin() as session:
        logs.append_log(session=session, **lease_of(claimed), text="\n")
    with reading(sessions) as session:
        assert logs.read_log(session=session, job_id=job.id) == ("\nfive\nsix\n", len(whole) + 1)
        start = logs.tail_start(session=session, job_id=job.id, num_lines=1)
        assert logs.read_log(session=session, job_id=job.id, after=start)[0] == "six\n"
    with pytest.raises(jobs.LeaseLostError), sessions.begin() as session:
        logs.append_log(session=session, job_id=job.id, lease_token="old", text="x")


def test_steps_come_in_the_order_of_writing_and_in_portions(sessions: Sessions) -> None:
    claimed = claim(sessions, create(sessions).id)

    def write(*records: MetricsRecord) -> None:
        with sessions.begin() as session:
            jobs.record_metrics(session=session, **lease_of(claimed), records=records)

    def after(position: int, *names: str, limit: int = 10, since_step: int = 0) -> tuple[list[Measured], int]:
        of_job: dict[str, Any] = {"job_id": claimed.job.id, "names": names or ["*"], "since_step": since_step}
        with reading(sessions) as session:
            return measured_after(session=session, after=position, limit=limit, **of_job)

    def steps(position: int) -> list[int]:
        return [one.step for one in after(position)[0]]

    first = [measured(step, train_loss=1 / step, train_lr=0.1) for step in range(1, 6)]
    write(*first)
    some, position = after(0, "train/lo*", limit=2)
    assert [(one.step, one.values) for one in some] == [(1, {"train/loss": 1.0}), (2, {"train/loss": 1 / 2})]
    assert [one.step for one in after(position, limit=2)[0]] == [3, 4]
    assert [one.step for one in after(0, since_step=4)[0]] == steps(after(0, limit=3)[1]) == [4, 5]
    assert steps(4) == [4, 5], "a step is a position, from which nothing of the steps from it on is missed"
    nothing, end = after(0, "none")
    assert (nothing, steps(end)) == ([], [])
    assert after(end) == ([], end)

    write(*first)
    assert steps(end) == [], "a replay is no news"
    write(measured(5, evaluation_top1=0.5), measured(6, train_loss=0.1))
    later, position = after(end)
    assert [one.values for one in later] == [{"evaluation/top1": 0.5, "train/loss": 1 / 5, "train/lr": 0.1}, {"train/loss": 0.1}]
    write(measured(4, attempt=2, train_loss=9.0), *first, measured(5, attempt=2, train_loss=8.0))
    again, end = after(position)
    assert [(one.step, one.values["train/loss"]) for one in again] == [(4, 9.0), (5, 8.0)], "a resumed run's own measurements"
    assert [one.step for one in after(0)[0]] == [1, 2, 3, 6, 4, 5]
    assert after(end) == ([], end)
    write(measured(1, attempt=2, train_loss=5.0), measured(5, attempt=3, train_loss=6.0))
    some, end = after(end)
    assert [one.step for one in some] == [1, 5], "not those between them"
    assert after(end) == ([], end)


def test_steps_that_an_older_version_wrote_get_their_place_when_they_are_replayed(sessions: Sessions) -> None:
    claimed = claim(sessions, create(sessions).id)
    records = [measured(step, train_loss=1.0) for step in range(3)]
    for _ in range(2):
        with sessions.begin() as session:
            jobs.record_metrics(session=session, **lease_of(claimed), records=records)
        with sessions.begin() as session:
            found, _ = measured_after(session=session, job_id=claimed.job.id, names=["*"], after=0, limit=10)
            assert sorted(one.step for one in found) == [0, 1, 2]
            session.execute(delete(MetricStep).where(MetricStep.step != 1))
