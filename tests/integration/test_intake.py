"""Submissions that are stored together: each is accepted or refused as if it came alone."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from psycopg.errors import DeadlockDetected
from sqlalchemy import select
from sqlalchemy.exc import OperationalError

from cliprd_core.spec import JobSpec
from service.intake import Intake, Submission, Submitted
from service.store import jobs
from service.store.events import EventKind, list_events
from service.store.idempotency import Keyed, digest
from service.store.models import Job, WebhookDelivery
from service.store.session import is_deadlock, reading
from service.store.states import JobState
from tests.live import eventually
from tests.store_helpers import FAILURE, Sessions, create, distilled_spec, finish, spec_dict
from tests.store_helpers import claim as claim_job


@pytest.fixture
def intake(sessions: Sessions) -> Intake:
    return Intake(sessions, max_attempts=3)


def submission(key: str | None = None, spec: JobSpec | None = None) -> Submission:
    spec = spec or JobSpec.model_validate(spec_dict())
    return Submission(spec, None if key is None else Keyed(key, digest(spec)))


def take_all(intake: Intake, submissions: Sequence[Submission]) -> list[Submitted | BaseException]:
    async def all_at_once() -> list[Submitted | BaseException]:
        return await asyncio.gather(*(intake.take(one) for one in submissions), return_exceptions=True)

    return asyncio.run(all_at_once())


def test_many_at_once_are_stored_whole(intake: Intake, sessions: Sessions) -> None:
    specs = [JobSpec.model_validate(spec_dict(name=f"job {number}", labels={"number": f"{number}"})) for number in range(250)]
    results = take_all(intake, [submission(f"key-{spec.name}".replace(" ", "-"), spec) for spec in specs])
    made = [one.job for one in results if isinstance(one, Submitted) and not one.is_replayed]
    assert [job.name for job in made] == [spec.name for spec in specs], results[0]
    with reading(sessions) as session:
        for number in (0, 249):
            found = jobs.list_jobs(session=session, labels={"number": f"{number}"}).rows
            assert [job.id for job in found] == [made[number].id]
            events = list_events(session=session, job_id=made[number].id)
            assert [event.kind for event in events] == [EventKind.CREATED, EventKind.QUEUED]
            assert found[0].sent_at is None
        assert session.query(WebhookDelivery).count() == 500


def test_submissions_outlive_a_deadlock(intake: Intake, sessions: Sessions) -> None:
    """Of PostgreSQL: SQLite has one writer."""
    with reading(sessions) as session:
        if session.get_bind().dialect.name != "postgresql":
            pytest.skip("it has no deadlocks")
    eventually(lambda: outlived_deadlock(intake, sessions) or None)


def outlived_deadlock(intake: Intake, sessions: Sessions) -> bool:
    """Whether a submission was given up for a deadlock, and stored all the same. It is mostly: it waits for longer than this other
    transaction, unless the machine stood still for a second just then, in which PostgreSQL looks for a deadlock in vain."""
    teachers = [create(sessions), create(sessions)]
    both = JobSpec.model_validate(spec_dict(recipe="clip_rd", teachers=[{"job": one.id} for one in teachers]))
    opposite = [one.id for one in sorted(teachers, key=lambda one: one.created_at, reverse=True)]
    with sessions() as session, ThreadPoolExecutor(1) as pool:
        session.execute(select(Job.id).where(Job.id == opposite[0]).with_for_update())
        submitted = pool.submit(take_all, intake, [submission(spec=both), submission()])
        eventually(lambda: is_locked(sessions, opposite[1]) or None)
        is_given_up = True
        try:
            session.execute(select(Job.id).where(Job.id == opposite[1]).with_for_update())
        except OperationalError as error:
            if not is_deadlock(error):
                raise
            is_given_up = False
        session.rollback()
        results = submitted.result(60)
    assert [isinstance(one, Submitted) for one in results] == [True, True], results
    return is_given_up


@pytest.mark.parametrize("num_submissions", [1, 3])
def test_submissions_outlive_one_deadlock_after_another(intake: Intake, num_submissions: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever waited for a lock need not have it before we try again, and meets us a second time."""
    deadlocks = [OperationalError("SELECT", {}, DeadlockDetected()) for _ in range(2)]
    create_jobs = jobs.create_jobs

    def create_at_last(**given: Any) -> Any:
        if deadlocks:
            raise deadlocks.pop()
        return create_jobs(**given)

    monkeypatch.setattr("service.store.jobs.create_jobs", create_at_last)
    results = take_all(intake, [submission() for _ in range(num_submissions)])
    assert [isinstance(one, Submitted) for one in results] == [True] * num_submissions, results
    assert deadlocks == []


def is_locked(sessions: Sessions, job_id: str) -> bool:
    with sessions() as session:
        free = select(Job.id).where(Job.id == job_id).with_for_update(skip_locked=True)
        return session.scalar(free) is None


def test_one_key_with_its_spec_and_with_another_at_once(intake: Intake) -> None:
    [used] = take_all(intake, [submission("used")])
    other = JobSpec.model_validate(spec_dict(name="other"))
    for batch in ([submission("used"), submission("used", other)], [submission("used", other), submission("used")]):
        results = take_all(intake, batch)
        assert isinstance(used, Submitted)
        assert [one.job.id for one in results if isinstance(one, Submitted)] == [used.job.id]
        assert [type(one) for one in results].count(jobs.IdempotencyConflictError) == 1


def test_a_submission_that_is_refused_leaves_the_others_alone(intake: Intake, sessions: Sessions) -> None:
    finished, unfinished = create(sessions), create(sessions)
    finish(sessions, claim_job(sessions, finished.id))
    [used] = take_all(intake, [submission("used")])
    assert isinstance(used, Submitted)
    other = JobSpec.model_validate(spec_dict(name="other"))
    results = take_all(
        intake,
        [
            submission("a"),
            submission(None, distilled_spec("00000000-none")),
            submission("used", other),
            submission("b", distilled_spec(unfinished.id, finished.id)),
            submission("used"),
            submission("twice"),
            submission("twice"),
            submission("twice", other),
            submission(None, distilled_spec(finished.id)),
        ],
    )
    told = [(one.job.state, one.is_replayed) if isinstance(one, Submitted) else type(one) for one in results]
    assert told == [
        (JobState.QUEUED, False),
        jobs.TeacherUnavailableError,
        jobs.IdempotencyConflictError,
        (JobState.WAITING, False),
        (JobState.QUEUED, True),
        (JobState.QUEUED, False),
        (JobState.QUEUED, True),
        jobs.IdempotencyConflictError,
        (JobState.QUEUED, False),
    ]
    new = [one.job.id for one in results if isinstance(one, Submitted) and not one.is_replayed and one.job.state is JobState.QUEUED]
    assert len(new) == 3
    with reading(sessions) as session:
        assert session.query(Job).count() == 3 + 1 + len(new)


def test_those_refused_for_their_teacher_cost_the_others_no_transaction(
    intake: Intake, sessions: Sessions, monkeypatch: pytest.MonkeyPatch
) -> None:
    failed = create(sessions)
    finish(sessions, claim_job(sessions, failed.id), FAILURE)
    calls = []
    create_jobs = jobs.create_jobs
    monkeypatch.setattr("service.store.jobs.create_jobs", lambda **given: calls.append(len(given["specs"])) or create_jobs(**given))
    bad = [submission(None, distilled_spec(teacher)) for teacher in (failed.id, "00000000-none")]
    results = take_all(intake, [submission("first"), submission("second"), *bad, submission("third")])
    assert [type(one) for one in results] == [Submitted, Submitted, *[jobs.TeacherUnavailableError] * 2, Submitted]
    assert sum(calls) == len(results)
    assert len(calls) <= 3  # the first two come alone


def test_a_database_out_of_reach_refuses_all_that_wait(intake: Intake, monkeypatch: pytest.MonkeyPatch) -> None:
    def out_of_reach(**_: object) -> None:
        raise OperationalError("", {}, OSError("gone"))

    with monkeypatch.context() as patched:
        patched.setattr("service.store.jobs.create_jobs", out_of_reach)
        assert [type(one) for one in take_all(intake, [submission("a"), submission("b")])] == [OperationalError] * 2
    again = take_all(intake, [submission("a"), submission("b")])
    assert [isinstance(one, Submitted) and not one.is_replayed for one in again] == [True, True]
