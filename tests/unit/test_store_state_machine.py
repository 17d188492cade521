"""The job state machine against a model of it: whatever order of calls, the store and the model agree."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from cliprd_core.run_dir import ErrorReason, ErrorRecord
from service.store import jobs
from service.store.jobs import ALLOWED_MOVES, Cancelled, JobState
from service.store.kinds import EventKind
from service.store.models import JobEvent
from service.store.session import database_now, make_engine, make_sessions, migrate, reading
from tests.store_helpers import FAILURE, SUCCESS, create, distilled_spec, measured, read

MAX_ATTEMPTS = 2
MAX_JOBS = 5
CHOICES = st.integers(0, MAX_JOBS - 1)
TELLS = {EventKind(state): state for state in JobState if state is not JobState.RUNNING} | {EventKind.CLAIMED: JobState.RUNNING}
FULL = ErrorRecord(reason=ErrorReason.DISK_FULL, message="No space left.")
NOT_QUEUED = [state for state in JobState if state is not JobState.QUEUED]


def test_every_state_is_in_the_table_and_the_finished_ones_are_final() -> None:
    assert set(ALLOWED_MOVES) == set(JobState)
    assert {state for state in JobState if state.is_finished} == {JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED}
    assert ALLOWED_MOVES[JobState.RUNNING] == {JobState.QUEUED, JobState.PAUSED, JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED}


@dataclass
class Expected:
    """What the model knows of one job."""

    state: JobState
    teacher: str | None
    num_claims: int = 0
    num_lost: int = 0
    cancel_requested: bool = False
    pause_requested: bool = False
    teacher_is_gone: bool = False
    tokens: list[str] = field(default_factory=list)


def has(*states: JobState) -> Callable[[JobLives], bool]:
    """Precondition of a rule: there is a job in one of these states, or any at all."""
    return lambda machine: bool(machine.ids(*states))


def has_room(machine: JobLives) -> bool:
    return len(machine.expected) < MAX_JOBS


def pick(ids: list[str], choice: int) -> str:
    return ids[choice % len(ids)]


class JobLives(RuleBasedStateMachine):
    """Users, workers and reapers at random. Few jobs and rules that look for one in the right state, so that lives are long."""

    template: Path

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(prefix="cliprd-states-"))
        shutil.copy(self.template, self.folder / "jobs.db")
        self.engine = make_engine(f"sqlite:///{self.folder / 'jobs.db'}")
        self.sessions = make_sessions(self.engine)
        self.expected: dict[str, Expected] = {}

    def teardown(self) -> None:
        self.engine.dispose()
        shutil.rmtree(self.folder)

    def ids(self, *states: JobState) -> list[str]:
        """Jobs that the model has in one of these states, oldest first; all of them for none."""
        return [job_id for job_id, one in self.expected.items() if not states or one.state in states]

    @precondition(has_room)
    @rule()
    def submit(self) -> None:
        job = create(self.sessions, max_attempts=MAX_ATTEMPTS)
        self.expected[job.id] = Expected(JobState.QUEUED, None)

    @precondition(has_room)
    @precondition(has())
    @rule(choice=CHOICES)
    def submit_student(self, choice: int) -> None:
        teacher = pick(self.ids(), choice)
        state = self.expected[teacher].state
        if state in (JobState.FAILED, JobState.CANCELLED):
            with pytest.raises(jobs.TeacherUnavailableError):
                create(self.sessions, distilled_spec(teacher))
            return
        job = create(self.sessions, distilled_spec(teacher), max_attempts=MAX_ATTEMPTS)
        self.expected[job.id] = Expected(JobState.QUEUED if state is JobState.SUCCEEDED else JobState.WAITING, teacher)

    @precondition(has(JobState.QUEUED))
    @rule(choice=CHOICES)
    def claim(self, choice: int) -> None:
        job_id = pick(self.ids(JobState.QUEUED), choice)
        with self.sessions.begin() as session:
            claimed = jobs.claim_job(session=session, job_id=job_id, worker="w", lease_seconds=60)
        assert claimed is not None
        one = self.expected[job_id]
        one.state, one.num_claims = JobState.RUNNING, one.num_claims + 1
        one.tokens.append(claimed.lease_token)
        assert claimed.attempt == one.num_claims

    @precondition(has(*NOT_QUEUED))
    @rule(choice=CHOICES)
    def claim_in_vain(self, choice: int) -> None:
        with self.sessions.begin() as session:
            job_id = pick(self.ids(*NOT_QUEUED), choice)
            assert jobs.claim_job(session=session, job_id=job_id, worker="w", lease_seconds=60) is None

    @precondition(has(JobState.RUNNING))
    @rule(choice=CHOICES, outcome=st.sampled_from([SUCCESS, FAILURE, FULL]))
    def finish(self, choice: int, outcome: jobs.Outcome) -> None:
        job_id = pick(self.ids(JobState.RUNNING), choice)
        with self.sessions.begin() as session:
            queued = jobs.finish_job(session=session, job_id=job_id, lease_token=self.expected[job_id].tokens[-1], outcome=outcome)
        if outcome is FULL:
            self.lose(job_id)
            assert queued == [], "what is queued for later is not sent now"
            return
        self.expected[job_id].num_lost += outcome is FAILURE
        became_queued = self.end(job_id, JobState.SUCCEEDED if outcome is SUCCESS else JobState.FAILED)
        assert sorted(job.job_id for job in queued) == sorted(became_queued)

    @precondition(has(JobState.RUNNING))
    @rule(choice=CHOICES)
    def stop_as_cancelled(self, choice: int) -> None:
        job_id = pick(self.ids(JobState.RUNNING), choice)
        one = self.expected[job_id]
        with self.sessions.begin() as session:
            lease: dict[str, Any] = {"session": session, "job_id": job_id, "lease_token": one.tokens[-1]}
            if not one.cancel_requested:
                with pytest.raises(ValueError, match="nobody asked"):
                    jobs.finish_job(**lease, outcome=Cancelled())
                return
            jobs.finish_job(**lease, outcome=Cancelled())
        self.end(job_id, JobState.CANCELLED)

    @precondition(has(JobState.RUNNING))
    @rule(choice=CHOICES)
    def release(self, choice: int) -> None:
        job_id = pick(self.ids(JobState.RUNNING), choice)
        one = self.expected[job_id]
        with self.sessions.begin() as session:
            released = jobs.release_job(session=session, job_id=job_id, lease_token=one.tokens[-1])
        assert (released is None) == (one.cancel_requested or one.pause_requested)
        if one.cancel_requested:
            self.end(job_id, JobState.CANCELLED)
        else:
            self.stop(job_id)

    @precondition(has())
    @rule(choice=CHOICES)
    def request_cancel(self, choice: int) -> None:
        job_id = pick(self.ids(), choice)
        one = self.expected[job_id]
        with self.sessions.begin() as session:
            if one.state in (JobState.SUCCEEDED, JobState.FAILED):
                with pytest.raises(jobs.JobFinishedError):
                    jobs.request_cancel(session=session, job_id=job_id)
                return
            jobs.request_cancel(session=session, job_id=job_id)
        if one.state is JobState.CANCELLED:
            return
        one.cancel_requested = True
        if one.state is not JobState.RUNNING:
            self.end(job_id, JobState.CANCELLED)

    @precondition(has())
    @rule(choice=CHOICES)
    def pause(self, choice: int) -> None:
        job_id = pick(self.ids(), choice)
        one = self.expected[job_id]
        with self.sessions.begin() as session:
            if one.state.is_finished or one.cancel_requested:
                with pytest.raises(jobs.JobFinishedError if one.state.is_finished else jobs.JobConflictError):
                    jobs.request_pause(session=session, job_id=job_id)
                return
            jobs.request_pause(session=session, job_id=job_id)
        if one.state is JobState.RUNNING:
            one.pause_requested = True
        else:
            one.state = JobState.PAUSED

    @precondition(has())
    @rule(choice=CHOICES)
    def resume(self, choice: int) -> None:
        job_id = pick(self.ids(), choice)
        one = self.expected[job_id]
        with self.sessions.begin() as session:
            if one.state.is_finished or one.cancel_requested:
                with pytest.raises(jobs.JobFinishedError if one.state.is_finished else jobs.JobConflictError):
                    jobs.resume_job(session=session, job_id=job_id)
                return
            _, queued = jobs.resume_job(session=session, job_id=job_id)
        one.pause_requested = False
        was_paused = one.state is JobState.PAUSED
        if was_paused:
            is_ready = one.teacher is None or self.expected[one.teacher].state is JobState.SUCCEEDED
            one.state = JobState.QUEUED if is_ready else JobState.WAITING
        assert [job.job_id for job in queued] == ([job_id] if was_paused and one.state is JobState.QUEUED else [])

    @precondition(has())
    @rule(choice=CHOICES)
    def retry(self, choice: int) -> None:
        job_id = pick(self.ids(), choice)
        one = self.expected[job_id]
        teacher = None if one.teacher is None or one.teacher_is_gone else self.expected[one.teacher].state
        with self.sessions.begin() as session:
            if one.teacher_is_gone or teacher in (JobState.FAILED, JobState.CANCELLED):
                with pytest.raises(jobs.TeacherUnavailableError):
                    jobs.retry_job(session=session, job_id=job_id)
                return
            if one.state not in (JobState.FAILED, JobState.CANCELLED):
                with pytest.raises(jobs.JobConflictError, match=f"is {one.state}"):
                    jobs.retry_job(session=session, job_id=job_id)
                return
            _, queued = jobs.retry_job(session=session, job_id=job_id)
        one.state = JobState.QUEUED if teacher in (None, JobState.SUCCEEDED) else JobState.WAITING
        one.num_lost, one.cancel_requested = 0, False
        assert [job.job_id for job in queued] == ([job_id] if one.state is JobState.QUEUED else [])

    @precondition(has())
    @rule(choice=CHOICES)
    def delete(self, choice: int) -> None:
        job_id = pick(self.ids(), choice)
        students = [one for one in self.expected.values() if one.teacher == job_id]
        with self.sessions.begin() as session:
            if not self.expected[job_id].state.is_finished or not all(one.state.is_finished for one in students):
                with pytest.raises(jobs.JobConflictError):
                    jobs.delete_job(session=session, job_id=job_id)
                return
            jobs.delete_job(session=session, job_id=job_id)
        del self.expected[job_id]
        for one in students:
            one.teacher_is_gone = True

    @precondition(has(JobState.RUNNING))
    @rule()
    def lose_every_worker(self) -> None:
        with self.sessions.begin() as session:
            queued = jobs.requeue_expired(session=session, now=database_now(session) + timedelta(seconds=61)).queued
        again = []
        for job_id in self.ids(JobState.RUNNING):
            if self.lose(job_id) is JobState.QUEUED:
                again.append(job_id)
        assert sorted(job.job_id for job in queued) == sorted(again)

    @precondition(has())
    @rule()
    def every_worker_that_ever_was_reports(self) -> None:
        """Only the latest token of a running job holds it; all others can neither renew nor write."""
        for job_id, one in self.expected.items():
            for token in one.tokens:
                holds = one.state is JobState.RUNNING and token == one.tokens[-1]
                with self.sessions.begin() as session:
                    lease: dict[str, Any] = {"session": session, "job_id": job_id, "lease_token": token}
                    assert jobs.renew_lease(**lease, lease_seconds=60) is holds
                    with nullcontext() if holds else pytest.raises(jobs.LeaseLostError):
                        jobs.record_metrics(**lease, records=[measured(1)])
                if holds:
                    job = read(self.sessions, job_id)
                    requested = (job.cancel_requested_at is not None, job.pause_requested_at is not None)
                    assert requested == (one.cancel_requested, one.pause_requested)

    def lose(self, job_id: str) -> JobState:
        """The model's end of an attempt that is tried again while attempts are left."""
        one = self.expected[job_id]
        one.num_lost += 1
        if one.cancel_requested:
            self.end(job_id, JobState.CANCELLED)
        elif one.num_lost >= MAX_ATTEMPTS:
            self.end(job_id, JobState.FAILED)
        else:
            self.stop(job_id)
        return one.state

    def stop(self, job_id: str) -> JobState:
        """The model's end of an attempt after which the job goes on, or waits to be resumed."""
        one = self.expected[job_id]
        one.state = JobState.PAUSED if one.pause_requested else JobState.QUEUED
        one.pause_requested = False
        return one.state

    def end(self, job_id: str, state: JobState) -> list[str]:
        """The model's end of a job and what follows for those that wait for it; returns the jobs that become queued."""
        self.expected[job_id].state = state
        self.expected[job_id].pause_requested = False
        became_queued = []
        for student_id, student in self.expected.items():
            if student.teacher != job_id or student.state not in (JobState.WAITING, JobState.PAUSED):
                continue
            if state is not JobState.SUCCEEDED:
                self.end(student_id, JobState.FAILED)
            elif student.state is JobState.WAITING:
                student.state = JobState.QUEUED
                became_queued.append(student_id)
        return became_queued

    @invariant()
    def store_and_model_agree(self) -> None:
        with reading(self.sessions) as session:
            rows = jobs.list_jobs(session=session, limit=1000).rows
            told = {event.job_id: TELLS[event.kind] for event in session.query(JobEvent).order_by(JobEvent.id) if event.kind in TELLS}
        assert {row.id: row.state for row in rows} == {job_id: one.state for job_id, one in self.expected.items()}
        assert told == {row.id: row.state for row in rows}, "the last event of a move tells the state"
        for row in rows:
            assert (row.lease_token is not None) == (row.lease_expires_at is not None) == (row.state is JobState.RUNNING)
            assert (row.finished_at is not None) == row.state.is_finished
            assert (row.error is not None) == (row.state is JobState.FAILED)
            assert (row.result is not None) == (row.state is JobState.SUCCEEDED)
            assert (row.queued_at is None) <= (row.state in (JobState.WAITING, JobState.PAUSED, JobState.FAILED, JobState.CANCELLED))
            assert (row.pause_requested_at is not None) == self.expected[row.id].pause_requested
            assert (row.attempt, row.failed_attempts) == (self.expected[row.id].num_claims, self.expected[row.id].num_lost)


def test_any_order_of_calls_keeps_store_and_model_together(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'template.db'}"
    migrate(url)
    JobLives.template = tmp_path / "template.db"
    machine = JobLives.TestCase
    machine.settings = settings(max_examples=40, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck))
    machine().runTest()
