"""When a queued job may start: from `queued_at` on, which lies ahead where it is to wait before it is tried again."""

from __future__ import annotations

from datetime import datetime, timedelta

from sqlalchemy import ColumnElement, or_

from service.store.failure_policy import FAILURE_POLICIES
from service.store.models import Job

LONGEST_DELAY = timedelta(seconds=max(policy.delay_seconds for policy in FAILURE_POLICIES.values()))


def is_due(at: datetime, now: datetime) -> ColumnElement[bool]:
    """Whether a job's `queued_at` was reached by `at`. One further ahead of `now` than any delay is of a clock that has been set back
    since, and a job must not wait until that clock's time comes round again."""
    return or_(Job.queued_at <= at, Job.queued_at > now + LONGEST_DELAY)
