"""What users ask of jobs that exist, on SQLite and PostgreSQL."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest

from cliprd_core.run_dir import ErrorReason
from service.store import jobs
from service.store.jobs import JobState
from service.store.session import database_now
from tests.store_helpers import FAILURE, SUCCESS, Sessions, claim, create, distilled_spec, finish, read


def pause(sessions: Sessions, job_id: str) -> JobState:
    with sessions.begin() as session:
        return jobs.request_pause(session=session, job_id=job_id).state


def resume(sessions: Sessions, job_id: str) -> list[str]:
    with sessions.begin() as session:
        return [job.job_id for job in jobs.resume_job(session=session, job_id=job_id).queued]


def release(sessions: Sessions, claimed: jobs.Claim) -> jobs.QueuedJob | None:
    with sessions.begin() as session:
        return jobs.release_job(session=session, job_id=claimed.job.id, lease_token=claimed.lease_token)


def lose_workers(sessions: Sessions) -> list[str]:
    with sessions.begin() as session:
        later = database_now(session) + timedelta(seconds=61)
        return [job.job_id for job in jobs.requeue_expired(session=session, now=later)]


def test_a_queued_job_is_paused_at_once_and_queued_by_its_resumption(sessions: Sessions) -> None:
    job = create(sessions)
    assert [pause(sessions, job.id) for _ in range(2)] == [JobState.PAUSED] * 2
    with sessions.begin() as session:
        assert jobs.claim_job(session=session, job_id=job.id, worker="w", lease_seconds=60) is None
    assert resume(sessions, job.id) == [job.id]
    assert resume(sessions, job.id) == []
    assert claim(sessions, job.id).attempt == 1


def test_a_running_job_is_paused_by_its_worker_and_the_attempt_is_not_held_against_it(sessions: Sessions) -> None:
    job = create(sessions, max_attempts=1)
    for _ in range(2):
        claimed = claim(sessions, job.id)
        assert [pause(sessions, job.id) for _ in range(2)] == [JobState.RUNNING] * 2
        with sessions.begin() as session:
            status = jobs.renew_lease(session=session, job_id=job.id, lease_token=claimed.lease_token, lease_seconds=60)
        assert status == jobs.LeaseStatus(held=True, cancel_requested=False, pause_requested=True)
        assert release(sessions, claimed) is None
        paused = read(sessions, job.id)
        assert (paused.state, paused.pause_requested_at, paused.lease_token) == (JobState.PAUSED, None, None)
        assert resume(sessions, job.id) == [job.id]
    assert claim(sessions, job.id).attempt == 3


def test_a_pause_that_is_taken_back_in_time_or_too_late_lets_the_job_go_on(sessions: Sessions) -> None:
    job = create(sessions)
    claimed = claim(sessions, job.id)
    pause(sessions, job.id)
    assert resume(sessions, job.id) == []
    assert read(sessions, job.id).pause_requested_at is None
    assert release(sessions, claimed) == jobs.QueuedJob(job.id, "default")  # the worker had begun to stop it


def test_a_worker_that_is_lost_while_pausing_leaves_the_job_paused(sessions: Sessions) -> None:
    job = create(sessions)
    claimed = claim(sessions, job.id)
    pause(sessions, job.id)
    assert lose_workers(sessions) == []
    assert read(sessions, job.id).state is JobState.PAUSED
    with pytest.raises(jobs.LeaseLostError):
        release(sessions, claimed)
    resume(sessions, job.id)
    assert claim(sessions, job.id).attempt == 2


@pytest.mark.parametrize("outcome", [SUCCESS, FAILURE])
def test_a_run_that_ends_before_the_pause_has_ended(sessions: Sessions, outcome: jobs.Outcome) -> None:
    job = create(sessions)
    claimed = claim(sessions, job.id)
    pause(sessions, job.id)
    finish(sessions, claimed, outcome)
    ended = read(sessions, job.id)
    assert ended.state.is_finished
    assert ended.pause_requested_at is None
    for ask in (pause, resume):
        with pytest.raises(jobs.JobFinishedError):
            ask(sessions, job.id)


def test_cancelling_a_paused_job_and_one_that_is_about_to_be(sessions: Sessions) -> None:
    paused, pausing = create(sessions), create(sessions)
    pause(sessions, paused.id)
    claimed = claim(sessions, pausing.id)
    pause(sessions, pausing.id)
    with sessions.begin() as session:
        assert jobs.request_cancel(session=session, job_id=paused.id).state is JobState.CANCELLED
        jobs.request_cancel(session=session, job_id=pausing.id)
    with pytest.raises(jobs.JobConflictError, match="is being cancelled"):
        pause(sessions, pausing.id)
    assert release(sessions, claimed) is None
    assert read(sessions, pausing.id).state is JobState.CANCELLED


def test_a_paused_student_is_resumed_to_wait_for_its_teacher_or_to_run(sessions: Sessions) -> None:
    teacher = create(sessions)
    early, late = (create(sessions, distilled_spec(teacher.id)) for _ in range(2))
    for student in (early, late):
        assert pause(sessions, student.id) is JobState.PAUSED
    assert resume(sessions, early.id) == []
    assert read(sessions, early.id).state is JobState.WAITING
    assert finish(sessions, claim(sessions, teacher.id)) == [jobs.QueuedJob(early.id, "default")]
    assert read(sessions, late.id).state is JobState.PAUSED
    assert resume(sessions, late.id) == [late.id]


def test_a_paused_student_fails_with_its_teacher(sessions: Sessions) -> None:
    teacher = create(sessions)
    student = create(sessions, distilled_spec(teacher.id))
    pause(sessions, student.id)
    finish(sessions, claim(sessions, teacher.id), FAILURE)
    failed = read(sessions, student.id)
    assert failed.error is not None
    assert failed.error["reason"] == ErrorReason.TEACHER_UNAVAILABLE


def test_a_student_resumed_while_its_teacher_finishes_is_not_forgotten(sessions: Sessions) -> None:
    for _ in range(5):
        claimed = claim(sessions, create(sessions).id)
        student = create(sessions, distilled_spec(claimed.job.id))
        pause(sessions, student.id)
        with ThreadPoolExecutor(2) as pool:
            resumed, finished = pool.submit(resume, sessions, student.id), pool.submit(finish, sessions, claimed)
            sent = resumed.result() + [job.job_id for job in finished.result()]
        assert (read(sessions, student.id).state, sent) == (JobState.QUEUED, [student.id])


def test_pausing_and_finishing_at_once_end_in_one_or_the_other(sessions: Sessions) -> None:
    for _ in range(5):
        claimed = claim(sessions, create(sessions).id)
        with ThreadPoolExecutor(2) as pool:
            asked, finished = pool.submit(pause, sessions, claimed.job.id), pool.submit(finish, sessions, claimed)
            finished.result()
            assert asked.exception() is None or isinstance(asked.exception(), jobs.JobFinishedError)
        assert read(sessions, claimed.job.id).state is JobState.SUCCEEDED
