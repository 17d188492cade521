"""What users ask of jobs that exist, on SQLite and PostgreSQL."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import pytest

from cliprd_core.run_dir import ErrorReason, ErrorRecord
from cliprd_core.spec import JobSpec
from service.store import jobs
from service.store.artifacts import register_artifacts
from service.store.blobs import StoredBlob
from service.store.failure_policy import FAILURE_POLICIES
from service.store.idempotency import Keyed, digest, find_submitted, forget_keys, remember_keys
from service.store.jobs import JobState
from service.store.kinds import ArtifactKind
from service.store.models import IdempotencyKey, Job
from service.store.session import database_now, reading
from service.store.unneeded_blobs import take_unneeded
from tests.store_helpers import FAILURE, SUCCESS, Sessions, claim, create, distilled_spec, evaluated, finish, measured, read, spec_dict


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
        return [job.job_id for job in jobs.requeue_expired(session=session, now=later).queued]


def retry(sessions: Sessions, job_id: str) -> list[str]:
    with sessions.begin() as session:
        return [job.job_id for job in jobs.retry_job(session=session, job_id=job_id).queued]


def delete(sessions: Sessions, job_id: str) -> None:
    with sessions.begin() as session:
        jobs.delete_job(session=session, job_id=job_id)


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
            assert jobs.renew_lease(session=session, job_id=job.id, lease_token=claimed.lease_token, lease_seconds=60)
        assert read(sessions, job.id).pause_requested_at is not None
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


def test_a_failed_job_is_tried_again_as_if_no_attempt_had_been_lost(sessions: Sessions) -> None:
    job = create(sessions, max_attempts=2)
    for _ in range(2):
        claim(sessions, job.id)
        lose_workers(sessions)
    assert read(sessions, job.id).state is JobState.FAILED
    assert retry(sessions, job.id) == [job.id]
    queued = read(sessions, job.id)
    assert (queued.state, queued.error, queued.finished_at) == (JobState.QUEUED, None, None)
    assert claim(sessions, job.id).attempt == 3
    assert lose_workers(sessions) == [job.id]


def test_attempts_before_one_that_got_further_do_not_count(sessions: Sessions) -> None:
    job = create(sessions, max_attempts=2)
    for attempt, step in ((1, 10), (2, 20), (3, 30), (4, 30)):
        claimed = claim(sessions, job.id)
        assert claimed.attempt == attempt
        with sessions.begin() as session:
            jobs.record_checkpoint(session=session, job_id=job.id, lease_token=claimed.lease_token, step=step)
        lose_workers(sessions)
    assert read(sessions, job.id).state is JobState.FAILED, "the fourth attempt got no further than the third"
    assert read(sessions, job.id).failed_attempts == 2


def test_a_cancelled_job_is_tried_again_and_is_not_cancelled_by_the_old_request(sessions: Sessions) -> None:
    job = create(sessions)
    claimed = claim(sessions, job.id)
    with sessions.begin() as session:
        jobs.request_cancel(session=session, job_id=job.id)
    finish(sessions, claimed, jobs.Cancelled())
    retry(sessions, job.id)
    assert release(sessions, claim(sessions, job.id)) == jobs.QueuedJob(job.id, "default")
    with pytest.raises(jobs.JobConflictError, match="is queued; only a failed or cancelled"):
        retry(sessions, job.id)


def test_a_student_that_failed_with_its_teacher_is_tried_again_after_it(sessions: Sessions) -> None:
    teacher = create(sessions)
    student = create(sessions, distilled_spec(teacher.id))
    finish(sessions, claim(sessions, teacher.id), FAILURE)
    with pytest.raises(jobs.TeacherUnavailableError):
        retry(sessions, student.id)
    assert retry(sessions, teacher.id) == [teacher.id]
    assert retry(sessions, student.id) == []
    assert read(sessions, student.id).state is JobState.WAITING
    assert finish(sessions, claim(sessions, teacher.id)) == [jobs.QueuedJob(student.id, "default")]


def with_model(sessions: Sessions, job_id: str) -> str:
    """Run a queued job to success; returns the id of its model."""
    claimed = claim(sessions, job_id)
    lease: dict[str, Any] = {"job_id": job_id, "lease_token": claimed.lease_token}
    blob = StoredBlob(key=f"ab/{job_id.replace('-', '')}", num_bytes=1, sha256="0" * 64)
    with sessions.begin() as session:
        jobs.record_metrics(session=session, **lease, records=[measured(1, train_loss=1.0)])
        jobs.record_evaluations(session=session, **lease, records=[evaluated(1)])
        (artifact,) = register_artifacts(session=session, **lease, kind=ArtifactKind.MODEL, group="export", files={"w": blob})
    finish(sessions, claimed)
    return artifact.id


def test_a_finished_job_is_deleted_with_all_its_rows(sessions: Sessions) -> None:
    job, other = create(sessions, JobSpec.model_validate(spec_dict(labels={"a": "b"}))), create(sessions)
    with sessions.begin() as session:
        remember_keys(session=session, submissions=[(Keyed("k", "0" * 64), job)])
    with_model(sessions, job.id)
    for refused in (other.id, "00000000-none"):
        with pytest.raises((jobs.JobConflictError, jobs.JobNotFoundError)):
            delete(sessions, refused)
    delete(sessions, job.id)
    with sessions.begin() as session:
        assert take_unneeded(session=session) == [f"ab/{job.id.replace('-', '')}"]
    with reading(sessions) as session:
        assert jobs.deleted_among(session=session, job_ids=[job.id, other.id, "unheard-of"]) == {job.id}
    with reading(sessions) as session:
        assert [one.id for one in session.query(Job)] == [other.id]
        for table in reversed(Job.metadata.sorted_tables):
            if "job_id" in table.columns and table.name != IdempotencyKey.__tablename__:
                assert job.id not in set(session.scalars(table.select().with_only_columns(table.c.job_id)))


@pytest.mark.parametrize("by", ["job", "artifact"])
def test_a_teacher_is_kept_until_its_students_have_finished(sessions: Sessions, by: str) -> None:
    teacher = create(sessions)
    artifact_id = with_model(sessions, teacher.id)
    named = {"job": teacher.id} if by == "job" else {"artifact": artifact_id}
    student = create(sessions, JobSpec.model_validate(spec_dict(recipe="clip_kd", teacher=named)))
    assert student.state is JobState.QUEUED
    with pytest.raises(jobs.JobConflictError, match=f"is a teacher of job {student.id}"):
        delete(sessions, teacher.id)
    finish(sessions, claim(sessions, student.id), FAILURE)
    delete(sessions, teacher.id)
    with pytest.raises(jobs.TeacherUnavailableError, match="there is no"):
        retry(sessions, student.id)


def test_unfinished_jobs_by_label_come_students_first(sessions: Sessions) -> None:
    labels = {"sweep": "1"}
    teacher = create(sessions, JobSpec.model_validate(spec_dict(labels={**labels, "more": "x"})))
    student = create(sessions, JobSpec.model_validate(spec_dict(labels=labels, recipe="clip_kd", teacher={"job": teacher.id})))
    create(sessions)
    finish(sessions, claim(sessions, create(sessions, JobSpec.model_validate(spec_dict(labels=labels))).id))
    with reading(sessions) as session:
        assert jobs.unfinished_jobs(session=session, labels=labels) == [student.id, teacher.id]
        assert jobs.unfinished_jobs(session=session, labels={**labels, "more": "x"}) == [teacher.id]


def test_idempotency_keys_are_kept_for_two_days(sessions: Sessions) -> None:
    spec, other = (JobSpec.model_validate(spec_dict(name=name)) for name in ("one", "other"))
    job = create(sessions, spec)
    with sessions.begin() as session:
        remember_keys(session=session, submissions=[(Keyed("k", digest(spec)), job)])
    with reading(sessions) as session:
        same, new, changed = Keyed("k", digest(spec)), Keyed("another", digest(spec)), Keyed("k", digest(other))
        found = find_submitted(session=session, submissions=[same, new, changed])
        assert found.keys() == {same, changed}
        assert getattr(found[same], "id", None) == job.id
        conflict = found[changed]
        assert isinstance(conflict, jobs.IdempotencyConflictError)
        assert job.id in str(conflict)
        assert find_submitted(session=session, submissions=[]) == {}
    finish(sessions, claim(sessions, job.id))
    delete(sessions, job.id)
    with reading(sessions) as session:
        for submission, refused in find_submitted(session=session, submissions=[same, changed]).items():
            assert isinstance(refused, jobs.IdempotencyConflictError), submission
            assert f"{job.id}, which was deleted" in str(refused)
    for age_hours, num_left in ((47, 1), (49, 0)):
        with sessions.begin() as session:
            row = session.get_one(IdempotencyKey, "k")
            row.created_at = database_now(session) - timedelta(hours=age_hours)
            session.flush()
            forget_keys(session=session)
        with reading(sessions) as session:
            assert session.query(IdempotencyKey).count() == num_left


def of_priority(sessions: Sessions, priority: int, queue: str = "default") -> str:
    spec = spec_dict(resources={"priority": priority, "queue": queue})
    return create(sessions, JobSpec.model_validate(spec)).id


def claim_next(sessions: Sessions, job_id: str) -> str | None:
    with sessions.begin() as session:
        claimed = jobs.claim_next(session=session, job_id=job_id, worker="w", lease_seconds=60)
    return None if claimed is None else claimed.job.id


def test_whatever_job_a_message_names_the_best_of_its_queue_is_claimed(sessions: Sessions) -> None:
    low, first, second, high = (of_priority(sessions, priority) for priority in (-1, 0, 0, 7))
    elsewhere = of_priority(sessions, 100, queue="other")
    assert claim_next(sessions, "00000000-none") is None
    assert [claim_next(sessions, low) for _ in range(5)] == [high, first, second, low, None]
    assert claim_next(sessions, elsewhere) == elsewhere


def test_a_job_that_is_queued_for_later_is_not_claimed_yet(sessions: Sessions) -> None:
    later, now = of_priority(sessions, 5), of_priority(sessions, 0)
    with sessions.begin() as session:
        session.get_one(Job, later).queued_at = database_now(session) + timedelta(seconds=60)
    assert [claim_next(sessions, later) for _ in range(2)] == [now, None]


def test_a_job_that_was_queued_before_the_clock_was_set_back_does_not_wait_for_it(sessions: Sessions) -> None:
    job_id = of_priority(sessions, 0)
    with sessions.begin() as session:
        job, now = session.get_one(Job, job_id), database_now(session)
        job.queued_at = job.sent_at = now + timedelta(hours=1)
        session.flush()
        assert jobs.jobs_to_send(session=session, queues=["default"], older_than_seconds=30, now=now) == [jobs.QueuedJob(job_id, "default")]
    assert claim_next(sessions, job_id) == job_id


def test_workers_that_claim_at_once_get_different_jobs(sessions: Sessions) -> None:
    expected = [of_priority(sessions, number % 2) for number in range(8)]
    gate = threading.Barrier(4)

    def claim_two(job_ids: list[str]) -> list[str | None]:
        gate.wait()
        return [claim_next(sessions, job_id) for job_id in job_ids]

    with ThreadPoolExecutor(4) as pool:
        claimed = [one for some in pool.map(claim_two, [expected[at : at + 2] for at in range(0, 8, 2)]) for one in some]
    assert sorted(one for one in claimed if one is not None) == sorted(expected)


@pytest.mark.parametrize("reason", list(ErrorReason))
def test_each_reason_is_retried_as_the_table_says(sessions: Sessions, reason: ErrorReason) -> None:
    policy = FAILURE_POLICIES[reason]
    job = create(sessions, max_attempts=2)
    error = ErrorRecord(reason=reason, message="so it is")
    queued = finish(sessions, claim(sessions, job.id), error)
    once = read(sessions, job.id)
    assert (once.state is JobState.QUEUED) == policy.is_retried
    if policy.is_retried:
        assert queued == ([] if policy.delay_seconds else [jobs.QueuedJob(job.id, "default")])
        with sessions.begin() as session:
            assert once.queued_at is not None
            wait = (once.queued_at - database_now(session)).total_seconds()
            assert policy.delay_seconds - 30 < wait <= policy.delay_seconds
            due = once.queued_at + timedelta(seconds=2)
            sent = jobs.jobs_to_send(session=session, queues=["default"], older_than_seconds=1, now=due)
            assert sent == [jobs.QueuedJob(job.id, "default")]
        assert (claim_next(sessions, job.id) is None) == (policy.delay_seconds > 0)
        if policy.delay_seconds:
            claim(sessions, job.id)
        assert finish_running(sessions, job.id, error) == []
    last = read(sessions, job.id)
    assert last.state is JobState.FAILED
    assert last.error is not None
    assert last.error["reason"] == reason.value


def finish_running(sessions: Sessions, job_id: str, outcome: jobs.Outcome) -> list[jobs.QueuedJob]:
    """Finish a job in the name of whoever holds it."""
    token = read(sessions, job_id).lease_token
    assert token is not None
    with sessions.begin() as session:
        return jobs.finish_job(session=session, job_id=job_id, lease_token=token, outcome=outcome)


def test_the_time_run_adds_up_over_attempts_and_starts_anew_with_a_retry(sessions: Sessions) -> None:
    job = create(sessions)
    for _ in range(2):
        claimed = claim(sessions, job.id)
        with sessions.begin() as session:
            session.get_one(Job, job.id).attempt_started_at = database_now(session) - timedelta(seconds=100)
        release(sessions, claimed)
    assert 200 <= read(sessions, job.id).seconds_run < 230
    finish(sessions, claim(sessions, job.id), FAILURE)
    retry(sessions, job.id)
    assert read(sessions, job.id).seconds_run == 0


@pytest.mark.parametrize("hours", [1, -1])
@pytest.mark.parametrize("is_renewed", [True, False])
def test_a_clock_that_is_set_is_no_time_that_a_job_ran(
    sessions: Sessions, monkeypatch: pytest.MonkeyPatch, hours: int, is_renewed: bool
) -> None:
    job = create(sessions)
    claimed = claim(sessions, job.id, lease_seconds=60)
    for module in ("leases", "recovery"):
        monkeypatch.setattr(f"service.store.{module}.database_now", lambda session: database_now(session) + timedelta(hours=hours))
    if is_renewed:
        with sessions.begin() as session:
            assert jobs.renew_lease(session=session, job_id=job.id, lease_token=claimed.lease_token, lease_seconds=60)
    release(sessions, claimed)
    assert 0 <= read(sessions, job.id).seconds_run < 60 + 30
