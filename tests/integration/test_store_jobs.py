"""Jobs in the store, on SQLite and PostgreSQL: claims, leases, cancellation, recovery, teachers that are jobs, pages."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import Connection, event, text

from cliprd_core.run_dir import ErrorReason, ErrorRecord, ResultRecord
from cliprd_core.spec import JobSpec
from service.store import jobs
from service.store.events import EventKind, list_events
from service.store.failure_policy import DEFAULT_MAX_ATTEMPTS
from service.store.jobs import Cancelled, JobState
from service.store.models import Job
from service.store.recovery import LONGEST_LEASE_SECONDS
from service.store.session import database_now, reading
from tests.store_helpers import (
    FAILURE,
    SUCCESS,
    Sessions,
    claim,
    create,
    distilled_spec,
    finish,
    measured,
    progress_at,
    read,
    spec_dict,
)


def cancel(sessions: Sessions, job_id: str) -> JobState:
    with sessions.begin() as session:
        return jobs.request_cancel(session=session, job_id=job_id).state


def requeue(sessions: Sessions, seconds_later: float) -> list[jobs.QueuedJob]:
    with sessions.begin() as session:
        return jobs.requeue_expired(session=session, now=database_now(session) + timedelta(seconds=seconds_later)).queued


@contextmanager
def statements(sessions: Sessions) -> Iterator[list[str]]:
    """Those that are executed meanwhile."""
    found: list[str] = []

    def note(_connection: Connection, _cursor: Any, statement: str, *_: Any) -> None:
        found.append(statement)

    with reading(sessions) as session:
        engine = session.get_bind()
    event.listen(engine, "before_cursor_execute", note)
    try:
        yield found
    finally:
        event.remove(engine, "before_cursor_execute", note)


def test_a_job_goes_from_queued_to_succeeded(sessions: Sessions) -> None:
    job = create(sessions)
    assert (job.state, job.attempt, job.max_attempts) == (JobState.QUEUED, 0, 3)
    claimed = claim(sessions, job.id)
    assert (claimed.attempt, claimed.job.state, claimed.job.worker) == (1, JobState.RUNNING, "worker-1")
    with sessions.begin() as session:
        jobs.mark_started(session=session, job_id=job.id, lease_token=claimed.lease_token)
        jobs.record_metrics(session=session, job_id=job.id, lease_token=claimed.lease_token, records=[measured(3)])
    assert finish(sessions, claimed) == []
    done = read(sessions, job.id)
    assert done.state is JobState.SUCCEEDED
    assert done.result == SUCCESS.model_dump(mode="json")
    assert done.progress == progress_at(3).model_dump(mode="json")
    assert done.started_at is not None
    assert done.finished_at is not None
    assert done.created_at <= done.started_at <= done.finished_at
    assert (done.lease_token, done.lease_expires_at) == (None, None)


def test_of_many_claimers_one_wins(sessions: Sessions) -> None:
    job = create(sessions)
    gate = threading.Barrier(8)

    def try_to_claim(number: int) -> jobs.Claim | None:
        gate.wait()
        with sessions.begin() as session:
            return jobs.claim_job(session=session, job_id=job.id, worker=f"worker-{number}", lease_seconds=60)

    with ThreadPoolExecutor(8) as pool:
        claims = [one for one in pool.map(try_to_claim, range(8)) if one is not None]
    assert len(claims) == 1
    assert read(sessions, job.id).worker == claims[0].job.worker
    assert read(sessions, job.id).attempt == 1


def test_a_worker_without_the_lease_can_write_nothing(sessions: Sessions) -> None:
    job = create(sessions)
    old = claim(sessions, job.id)
    assert requeue(sessions, 61) == [jobs.QueuedJob(job.id, "default")]
    new = claim(sessions, job.id, worker="worker-2")
    assert new.attempt == 2
    with sessions.begin() as session:
        lease: dict[str, Any] = {"session": session, "job_id": job.id, "lease_token": old.lease_token}
        assert not jobs.renew_lease(**lease, lease_seconds=60)
        writes: list[tuple[Callable[..., object], dict[str, object]]] = [
            (jobs.mark_started, {}),
            (jobs.record_metrics, {"records": [measured(1, train_loss=1.0)]}),
            (jobs.record_evaluations, {"records": []}),
            (jobs.finish_job, {"outcome": SUCCESS}),
            (jobs.release_job, {}),
        ]
        for write, argument in writes:
            with pytest.raises(jobs.LeaseLostError):
                write(**lease, **argument)
    now = read(sessions, job.id)
    assert (now.state, now.worker, now.progress, now.metrics) == (JobState.RUNNING, "worker-2", None, None)


def test_a_renewed_lease_outlives_its_first_end(sessions: Sessions) -> None:
    job = create(sessions)
    claimed = claim(sessions, job.id, lease_seconds=10)
    with sessions.begin() as session:
        assert jobs.renew_lease(session=session, job_id=job.id, lease_token=claimed.lease_token, lease_seconds=100)
    assert requeue(sessions, 50) == []
    assert requeue(sessions, 101) == [jobs.QueuedJob(job.id, "default")]


def test_a_job_whose_workers_vanish_fails_at_the_last_attempt(sessions: Sessions) -> None:
    job = create(sessions, max_attempts=2)
    claim(sessions, job.id)
    assert len(requeue(sessions, 61)) == 1
    claim(sessions, job.id)
    assert requeue(sessions, 61) == []
    failed = read(sessions, job.id)
    assert failed.state is JobState.FAILED
    assert failed.error is not None
    assert failed.error["reason"] == ErrorReason.WORKER_LOST


def test_attempts_are_counted_over_all_reasons_that_are_retried(sessions: Sessions) -> None:
    job = create(sessions)
    assert job.max_attempts == DEFAULT_MAX_ATTEMPTS == 3
    for reason in (ErrorReason.DISK_FULL, ErrorReason.WORKER_LOST, ErrorReason.DISK_FULL):
        assert read(sessions, job.id).state is JobState.QUEUED
        finish(sessions, claim(sessions, job.id), ErrorRecord(reason=reason, message="it may pass"))
    assert read(sessions, job.id).state is JobState.FAILED


def test_a_released_job_is_queued_and_its_attempt_not_held_against_it(sessions: Sessions) -> None:
    job = create(sessions, max_attempts=1)
    for _ in range(3):
        claimed = claim(sessions, job.id)
        with sessions.begin() as session:
            released = jobs.release_job(session=session, job_id=job.id, lease_token=claimed.lease_token)
        assert released == jobs.QueuedJob(job.id, "default")
    assert claim(sessions, job.id).attempt == 4
    assert requeue(sessions, 61) == []  # the first lost attempt is the last
    assert read(sessions, job.id).state is JobState.FAILED


def test_two_reapers_share_the_work(sessions: Sessions) -> None:
    expected = sorted(claim(sessions, create(sessions).id).job.id for _ in range(6))
    with ThreadPoolExecutor(2) as pool:
        both = [queued.job_id for queue in pool.map(lambda _: requeue(sessions, 61), range(2)) for queued in queue]
    assert sorted(both) == expected


def test_cancelling(sessions: Sessions) -> None:
    queued, running, ended = create(sessions), create(sessions), create(sessions)
    assert [cancel(sessions, queued.id) for _ in range(2)] == [JobState.CANCELLED] * 2
    finish(sessions, claim(sessions, ended.id))
    with pytest.raises(jobs.JobFinishedError):
        cancel(sessions, ended.id)
    with pytest.raises(jobs.JobNotFoundError):
        cancel(sessions, "00000000-none")

    claimed = claim(sessions, running.id)
    with pytest.raises(ValueError, match="nobody asked"):
        finish(sessions, claimed, Cancelled())
    assert cancel(sessions, running.id) is JobState.RUNNING
    asked_at = read(sessions, running.id).cancel_requested_at
    assert cancel(sessions, running.id) is JobState.RUNNING
    assert read(sessions, running.id).cancel_requested_at == asked_at
    with sessions.begin() as session:
        assert jobs.renew_lease(session=session, job_id=running.id, lease_token=claimed.lease_token, lease_seconds=60)
    finish(sessions, claimed, Cancelled())
    assert read(sessions, running.id).state is JobState.CANCELLED


def test_a_job_to_be_cancelled_is_never_queued_again(sessions: Sessions) -> None:
    lost, released = create(sessions), create(sessions)
    claim(sessions, lost.id)
    claimed = claim(sessions, released.id)
    cancel(sessions, lost.id)
    cancel(sessions, released.id)
    with sessions.begin() as session:
        assert jobs.release_job(session=session, job_id=released.id, lease_token=claimed.lease_token) is None
    assert requeue(sessions, 61) == []
    assert {read(sessions, one.id).state for one in (lost, released)} == {JobState.CANCELLED}


def test_a_student_waits_for_its_teacher_and_is_queued_by_its_success(sessions: Sessions) -> None:
    teacher = create(sessions)
    students = [create(sessions, distilled_spec(teacher.id)) for _ in range(2)]
    assert [(one.state, one.queued_at) for one in students] == [(JobState.WAITING, None)] * 2
    with sessions.begin() as session:
        assert jobs.claim_job(session=session, job_id=students[0].id, worker="w", lease_seconds=1) is None
    queued = finish(sessions, claim(sessions, teacher.id))
    assert sorted(queued) == sorted(jobs.QueuedJob(one.id, "default") for one in students)
    assert read(sessions, students[0].id).state is JobState.QUEUED
    assert create(sessions, distilled_spec(teacher.id)).state is JobState.QUEUED


@pytest.mark.parametrize("end", ["fail", "cancel", "lose"])
def test_a_teacher_that_ends_badly_takes_its_students_and_theirs_along(sessions: Sessions, end: str) -> None:
    teacher = create(sessions, max_attempts=1)
    student = create(sessions, distilled_spec(teacher.id))
    grandstudent = create(sessions, distilled_spec(student.id))
    if end == "cancel":
        cancel(sessions, teacher.id)
    else:
        claimed = claim(sessions, teacher.id)
        queued = finish(sessions, claimed, FAILURE) if end == "fail" else requeue(sessions, 61)
        assert queued == []
    for one in (student, grandstudent):
        failed = read(sessions, one.id)
        assert failed.state is JobState.FAILED
        assert failed.error is not None
        assert failed.error["reason"] == ErrorReason.TEACHER_UNAVAILABLE
    with pytest.raises(jobs.TeacherUnavailableError, match="no model to offer"):
        create(sessions, distilled_spec(teacher.id))


@pytest.mark.parametrize("outcome", [SUCCESS, FAILURE])
def test_a_teachers_end_takes_as_many_statements_for_many_students_as_for_one(
    sessions: Sessions, outcome: ResultRecord | ErrorRecord
) -> None:
    def num_statements(num_students: int) -> int:
        teacher = claim(sessions, create(sessions).id)
        students = [create(sessions, distilled_spec(teacher.job.id)) for _ in range(num_students)]
        for student in students:
            create(sessions, distilled_spec(student.id))
        with statements(sessions) as found:
            finish(sessions, teacher, outcome)
        state = JobState.QUEUED if outcome is SUCCESS else JobState.FAILED
        assert {read(sessions, student.id).state for student in students} == {state}
        return len(found)

    with reading(sessions) as session:
        if session.get_bind().dialect.name != "postgresql":
            pytest.skip("it is given rows one by one")
    assert num_statements(7) == num_statements(2)


@pytest.mark.parametrize("outcome", [SUCCESS, FAILURE])
def test_more_students_than_a_statement_takes_ids_end_with_their_teacher(
    sessions: Sessions, outcome: ResultRecord | ErrorRecord, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.store.transitions.MAX_IDS", 2)
    teacher = claim(sessions, create(sessions).id)
    students = [create(sessions, distilled_spec(teacher.job.id)).id for _ in range(5)]
    both = create(sessions, distilled_spec(students[0], students[4])).id
    queued = finish(sessions, teacher, outcome)
    states = [read(sessions, job_id).state for job_id in (*students, both)]
    if outcome is SUCCESS:
        assert sorted(job_id for job_id, _ in queued) == sorted(students)
        assert states == [*[JobState.QUEUED] * 5, JobState.WAITING]
    else:
        assert states == [JobState.FAILED] * 6
        with reading(sessions) as session:
            assert [one.kind for one in list_events(session=session, job_id=both)][-1] is EventKind.FAILED
            assert [one.kind for one in list_events(session=session, job_id=both)].count(EventKind.FAILED) == 1


def test_teachers_that_do_not_exist_are_refused(sessions: Sessions) -> None:
    with pytest.raises(jobs.TeacherUnavailableError, match="no job '00000000-none'"):
        create(sessions, distilled_spec("00000000-none"))
    spec = JobSpec.model_validate(spec_dict(recipe="clip_kd", teacher={"artifact": "00000000-none"}))
    with pytest.raises(jobs.TeacherUnavailableError, match="no artifact"):
        create(sessions, spec)


def test_a_student_submitted_while_its_teacher_finishes_is_not_forgotten(sessions: Sessions) -> None:
    for _ in range(5):
        claimed = claim(sessions, create(sessions).id)
        with ThreadPoolExecutor(2) as pool:
            submitted = pool.submit(create, sessions, distilled_spec(claimed.job.id))
            finished = pool.submit(finish, sessions, claimed)
            student, queued = submitted.result(), finished.result()
        assert read(sessions, student.id).state is JobState.QUEUED
        assert queued == ([jobs.QueuedJob(student.id, "default")] if student.state is JobState.WAITING else [])


def test_a_student_of_several_waits_for_the_last_of_them(sessions: Sessions) -> None:
    first, second = create(sessions), create(sessions)
    student = create(sessions, distilled_spec(second.id, first.id, second.id))
    assert (student.state, student.teacher_job_ids) == (JobState.WAITING, [second.id, first.id, second.id])
    assert finish(sessions, claim(sessions, first.id)) == []
    assert read(sessions, student.id).state is JobState.WAITING
    assert finish(sessions, claim(sessions, second.id)) == [jobs.QueuedJob(student.id, "default")]
    assert create(sessions, distilled_spec(first.id, second.id)).state is JobState.QUEUED


@pytest.mark.parametrize("order", [0, 1])
def test_one_failed_teacher_of_several_is_enough(sessions: Sessions, order: int) -> None:
    good, bad = create(sessions), create(sessions)
    student = create(sessions, distilled_spec(good.id, bad.id))
    ends = [(good, SUCCESS), (bad, FAILURE)]
    for job, outcome in ends if order else reversed(ends):
        assert finish(sessions, claim(sessions, job.id), outcome) == []
    assert read(sessions, student.id).state is JobState.FAILED
    with pytest.raises(jobs.TeacherUnavailableError) as refused:
        create(sessions, distilled_spec(good.id, bad.id))
    assert refused.value.field == "teachers.1.job"


def test_of_teachers_that_finish_at_once_one_queues_the_student(sessions: Sessions) -> None:
    for _ in range(5):
        claims = [claim(sessions, create(sessions).id) for _ in range(2)]
        student = create(sessions, distilled_spec(*(one.job.id for one in claims)))
        with ThreadPoolExecutor(2) as pool:
            queued = [one for found in pool.map(lambda claimed: finish(sessions, claimed), claims) for one in found]
        assert queued == [jobs.QueuedJob(student.id, "default")]


def test_a_lease_given_out_before_the_clock_was_set_back_runs_out_all_the_same(sessions: Sessions) -> None:
    held, dead = claim(sessions, create(sessions).id), claim(sessions, create(sessions).id)
    back, longest = -3600.0, LONGEST_LEASE_SECONDS  # the clock, by an hour
    assert requeue(sessions, back) == [], "a holder must have the time to renew it"
    with sessions.begin() as session:
        job = session.get_one(Job, held.job.id)
        assert job.lease_expires_at is not None
        job.lease_expires_at += timedelta(seconds=60)  # what the holder does meanwhile
    assert requeue(sessions, back + longest - 30) == []
    assert requeue(sessions, back + longest + 2) == [jobs.QueuedJob(dead.job.id, "default")]
    assert read(sessions, held.job.id).state is JobState.RUNNING


def test_messages_that_may_be_lost_are_sent_again(sessions: Sessions) -> None:
    spec = JobSpec.model_validate(spec_dict(resources={"queue": "gpu"}))
    sent, unsent, taken = create(sessions), create(sessions, spec), create(sessions)
    claim(sessions, taken.id)
    with sessions.begin() as session:
        jobs.mark_sent(session=session, job_ids=[sent.id, taken.id])
    with sessions.begin() as session:
        now = database_now(session)
        assert jobs.num_to_send(session=session, older_than_seconds=30, now=now) == {}
        assert jobs.jobs_to_send(session=session, queues=["default", "gpu"], older_than_seconds=30, now=now) == []
        later = now + timedelta(seconds=31)
        assert jobs.num_to_send(session=session, older_than_seconds=30, now=later) == {"default": 1, "gpu": 1}
        both = [jobs.QueuedJob(sent.id, "default"), jobs.QueuedJob(unsent.id, "gpu")]
        assert jobs.jobs_to_send(session=session, queues=["default", "gpu"], older_than_seconds=30, now=later) == both
        assert jobs.jobs_to_send(session=session, queues=["gpu"], older_than_seconds=30, now=later) == both[1:]
    assert read(sessions, taken.id).sent_at is None


def test_no_queue_waits_for_a_longer_one_to_have_its_messages_sent_again(sessions: Sessions) -> None:
    long = [create(sessions) for _ in range(4)]
    short = create(sessions, JobSpec.model_validate(spec_dict(resources={"queue": "gpu"})))
    with sessions.begin() as session:
        later = database_now(session) + timedelta(seconds=31)
        sent = jobs.jobs_to_send(session=session, queues=["default", "gpu"], older_than_seconds=30, now=later, limit=3)
    assert [one.job_id for one in sent] == [long[0].id, short.id, long[1].id]


def test_pages_are_newest_first_and_stable_while_jobs_are_added(sessions: Sessions) -> None:
    created = [create(sessions).id for _ in range(7)]
    seen: list[str] = []
    cursor = None
    while True:
        with reading(sessions) as session:
            page = jobs.list_jobs(session=session, limit=3, cursor=cursor)
        seen += [job.id for job in page.rows]
        create(sessions)
        cursor = page.next_cursor
        if cursor is None:
            break
    assert seen == created[::-1]


def test_a_page_of_long_specs_ends_before_its_limit(sessions: Sessions, monkeypatch: pytest.MonkeyPatch) -> None:
    long = [create(sessions, JobSpec.model_validate(spec_dict(name="x" * 128, labels={"a": "x" * 128}))) for _ in range(3)]
    monkeypatch.setattr(jobs, "MAX_PAGE_CHARACTERS", int(2.5 * len(json.dumps(long[0].spec))))
    sizes, seen, cursor = [], [], None
    while not sizes or cursor is not None:
        with reading(sessions) as session:
            page = jobs.list_jobs(session=session, limit=50, cursor=cursor)
        sizes.append(len(page.rows))
        seen += [job.id for job in page.rows]
        cursor = page.next_cursor
    assert sizes == [2, 1]
    assert seen == [job.id for job in reversed(long)]
    monkeypatch.setattr(jobs, "MAX_PAGE_CHARACTERS", 1)
    with reading(sessions) as session:
        assert len(jobs.list_jobs(session=session).rows) == 1, "one that is too long by itself is told of, too"


def test_pages_tell_jobs_of_the_same_instant_apart(sessions: Sessions) -> None:
    with sessions.begin() as session:
        moment = database_now(session)
        for _ in range(5):
            job = jobs.create_job(session=session, spec=JobSpec.model_validate(spec_dict()))
            job.created_at = moment
    with reading(sessions) as session:
        first = jobs.list_jobs(session=session, limit=2)
        rest = jobs.list_jobs(session=session, limit=10, cursor=first.next_cursor)
    assert len({job.id for job in [*first.rows, *rest.rows]}) == 5


def test_lists_by_state_and_labels(sessions: Sessions) -> None:
    def labelled(**labels: str) -> str:
        return create(sessions, JobSpec.model_validate(spec_dict(labels=labels))).id

    both, one, _ = labelled(team="a", run="1"), labelled(team="a", run="2"), labelled(team="b")
    claim(sessions, one)
    with reading(sessions) as session:

        def ids(state: JobState | None = None, **labels: str) -> list[str]:
            return [job.id for job in jobs.list_jobs(session=session, state=state, labels=labels).rows]

        assert ids(team="a") == [one, both]
        assert ids(team="a", run="1") == [both]
        assert ids(JobState.RUNNING, team="a") == [one]
        assert ids(JobState.RUNNING, run="1") == []


@pytest.mark.parametrize("cursor", ["", "x", "bm90IGpzb24", "WzEsIDJd", "W10", "Wy" + "I" * 300])
def test_cursors_of_another_make_are_refused(sessions: Sessions, cursor: str) -> None:
    with reading(sessions) as session, pytest.raises(jobs.InvalidCursorError):
        jobs.list_jobs(session=session, cursor=cursor)


def test_readers_do_not_wait_for_a_writer(sessions: Sessions) -> None:
    job = create(sessions)
    with sessions.begin() as session:
        jobs.request_cancel(session=session, job_id=job.id)
        assert read(sessions, job.id).state is JobState.QUEUED
    assert read(sessions, job.id).state is JobState.CANCELLED


def test_the_next_job_of_a_long_queue_is_found_without_sorting_it(sessions: Sessions) -> None:
    job = create(sessions)
    plans: list[str] = []
    with sessions() as session:
        connection = session.connection()
        if connection.dialect.name != "postgresql":
            pytest.skip("its plans read otherwise")
        session.execute(text("SET LOCAL enable_seqscan = off"))  # which is right for few jobs only

        @event.listens_for(connection, "before_cursor_execute")
        def explain(_connection: Connection, cursor: Any, statement: str, given: Any, *_: Any) -> None:
            if "ORDER BY jobs.priority DESC" in statement:
                cursor.execute(f"EXPLAIN {statement}", given)
                plans.append("\n".join(row[0] for row in cursor.fetchall()))

        assert jobs.claim_next(session=session, job_id=job.id, worker="w", lease_seconds=60) is not None
    (plan,) = plans
    assert "jobs_to_claim_first" in plan
    assert "Sort" not in plan
