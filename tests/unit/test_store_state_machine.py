"""The job state machine against a model of it: whatever order of calls, the store and the model agree."""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, rule

from service.store import jobs
from service.store.jobs import ALLOWED_MOVES, Cancelled, JobState
from service.store.session import database_now, make_engine, make_sessions, migrate, reading
from tests.store_helpers import FAILURE, SUCCESS, create, distilled_spec

MAX_ATTEMPTS = 2
NO_TOKEN = "never-issued"


def test_every_state_is_in_the_table_and_the_finished_ones_are_final() -> None:
    assert set(ALLOWED_MOVES) == set(JobState)
    assert {state for state in JobState if state.is_finished} == {JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED}
    assert ALLOWED_MOVES[JobState.RUNNING] == {JobState.QUEUED, JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED}


@dataclass
class Expected:
    """What the model knows of one job."""

    state: JobState
    teacher: str | None
    token: str = NO_TOKEN
    num_claims: int = 0
    num_lost: int = 0
    cancel_requested: bool = False
    old_tokens: list[str] = field(default_factory=list)


class JobLives(RuleBasedStateMachine):
    """Users, workers and reapers at random."""

    ids = Bundle("ids")
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

    @rule(target=ids)
    def submit(self) -> str:
        job = create(self.sessions, max_attempts=MAX_ATTEMPTS)
        self.expected[job.id] = Expected(JobState.QUEUED, None)
        return job.id

    @rule(target=ids, teacher=ids)
    def submit_student(self, teacher: str) -> str:
        state = self.expected[teacher].state
        if state in (JobState.FAILED, JobState.CANCELLED):
            with pytest.raises(jobs.TeacherUnavailableError):
                create(self.sessions, distilled_spec(teacher))
            return teacher
        job = create(self.sessions, distilled_spec(teacher), max_attempts=MAX_ATTEMPTS)
        self.expected[job.id] = Expected(JobState.QUEUED if state is JobState.SUCCEEDED else JobState.WAITING, teacher)
        return job.id

    @rule(job_id=ids)
    def claim(self, job_id: str) -> None:
        with self.sessions.begin() as session:
            claimed = jobs.claim_job(session=session, job_id=job_id, worker="w", lease_seconds=60)
        one = self.expected[job_id]
        assert (claimed is not None) == (one.state is JobState.QUEUED)
        if claimed is not None:
            one.state, one.token = JobState.RUNNING, claimed.lease_token
            one.num_claims += 1
            assert claimed.attempt == one.num_claims

    @rule(job_id=ids, outcome=st.sampled_from([SUCCESS, FAILURE]))
    def finish(self, job_id: str, outcome: jobs.Outcome) -> None:
        one = self.expected[job_id]
        with self.sessions.begin() as session:
            if one.state is not JobState.RUNNING:
                with pytest.raises(jobs.LeaseLostError):
                    jobs.finish_job(session=session, job_id=job_id, lease_token=one.token, outcome=outcome)
                return
            queued = jobs.finish_job(session=session, job_id=job_id, lease_token=one.token, outcome=outcome)
        became_queued = self.end(job_id, JobState.SUCCEEDED if outcome is SUCCESS else JobState.FAILED)
        assert sorted(job.job_id for job in queued) == sorted(became_queued)

    @rule(job_id=ids)
    def finish_cancelled(self, job_id: str) -> None:
        one = self.expected[job_id]
        if one.state is JobState.RUNNING and one.cancel_requested:
            with self.sessions.begin() as session:
                jobs.finish_job(session=session, job_id=job_id, lease_token=one.token, outcome=Cancelled())
            self.end(job_id, JobState.CANCELLED)

    @rule(job_id=ids)
    def release(self, job_id: str) -> None:
        one = self.expected[job_id]
        if one.state is not JobState.RUNNING:
            return
        with self.sessions.begin() as session:
            released = jobs.release_job(session=session, job_id=job_id, lease_token=one.token)
        assert (released is None) == one.cancel_requested
        if one.cancel_requested:
            self.end(job_id, JobState.CANCELLED)
        else:
            one.old_tokens.append(one.token)
            one.state = JobState.QUEUED

    @rule(job_id=ids)
    def request_cancel(self, job_id: str) -> None:
        one = self.expected[job_id]
        with self.sessions.begin() as session:
            if one.state.is_finished:
                with pytest.raises(jobs.JobFinishedError):
                    jobs.request_cancel(session=session, job_id=job_id)
                return
            jobs.request_cancel(session=session, job_id=job_id)
        one.cancel_requested = True
        if one.state is not JobState.RUNNING:
            self.end(job_id, JobState.CANCELLED)

    @rule()
    def lose_every_worker(self) -> None:
        with self.sessions.begin() as session:
            queued = jobs.requeue_expired(session=session, now=database_now(session) + timedelta(seconds=61))
        again = []
        for job_id, one in self.expected.items():
            if one.state is not JobState.RUNNING:
                continue
            one.old_tokens.append(one.token)
            one.num_lost += 1
            if one.cancel_requested:
                self.end(job_id, JobState.CANCELLED)
            elif one.num_lost >= MAX_ATTEMPTS:
                self.end(job_id, JobState.FAILED)
            else:
                one.state = JobState.QUEUED
                again.append(job_id)
        assert sorted(job.job_id for job in queued) == sorted(again)

    @rule(job_id=ids)
    def renew(self, job_id: str) -> None:
        one = self.expected[job_id]
        with self.sessions.begin() as session:
            status = jobs.renew_lease(session=session, job_id=job_id, lease_token=one.token, lease_seconds=60)
            assert status.held == (one.state is JobState.RUNNING)
            assert status.cancel_requested == (status.held and one.cancel_requested)
            for token in one.old_tokens:
                assert not jobs.renew_lease(session=session, job_id=job_id, lease_token=token, lease_seconds=60).held

    def end(self, job_id: str, state: JobState) -> list[str]:
        """The model's end of a job and what follows for those that wait for it; returns the jobs that become queued."""
        self.expected[job_id].state = state
        became_queued = []
        for student_id, student in self.expected.items():
            if student.teacher == job_id and student.state is JobState.WAITING:
                if state is JobState.SUCCEEDED:
                    student.state = JobState.QUEUED
                    became_queued.append(student_id)
                else:
                    self.end(student_id, JobState.FAILED)
        return became_queued

    @invariant()
    def store_and_model_agree(self) -> None:
        with reading(self.sessions) as session:
            rows = jobs.list_jobs(session=session, limit=1000).rows
        assert {row.id: row.state for row in rows} == {job_id: one.state for job_id, one in self.expected.items()}
        for row in rows:
            assert (row.lease_token is not None) == (row.lease_expires_at is not None) == (row.state is JobState.RUNNING)
            assert (row.finished_at is not None) == row.state.is_finished
            assert (row.error is not None) == (row.state is JobState.FAILED)
            assert (row.result is not None) == (row.state is JobState.SUCCEEDED)
            assert (row.queued_at is None) <= (row.state in (JobState.WAITING, JobState.FAILED, JobState.CANCELLED))


def test_any_order_of_calls_keeps_store_and_model_together(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'template.db'}"
    migrate(url)
    JobLives.template = tmp_path / "template.db"
    machine = JobLives.TestCase
    machine.settings = settings(max_examples=25, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck))
    machine().runTest()
