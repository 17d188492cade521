"""Bytes in the blob store that no artifact names: any more, or yet, as those of an upload that may never end.

Their keys are noted in the transaction that removes the artifacts. Whoever does that may delete the bytes at once; where it fails or
crashes, or nobody does, a worker's cleaner deletes them. A worker notes the key of an upload before it begins, and the transaction that
makes the bytes known removes the note; so whenever the worker is killed, no bytes stay that nothing names.
"""

from __future__ import annotations

from collections.abc import Collection
from datetime import datetime, timedelta

from sqlalchemy import delete, exists, select, update
from sqlalchemy.orm import Session

from service.store.models import Job, UnneededBlob
from service.store.session import database_now
from service.store.states import JobState

FIRST_RETRY_SECONDS, LONGEST_RETRY_SECONDS = 60, 6 * 3600
"""Pause after the first try that failed; it doubles up to the second. No number of tries is the last: the bytes are somebody's space."""


def note_unneeded(*, session: Session, storage_keys: Collection[str], lease_token: str | None = None) -> None:
    """Have the bytes under these keys, each of which only one artifact ever had, deleted some time after the commit.

    Args:
        session: The database's.
        storage_keys: Those keys.
        lease_token: Of the attempt that is about to upload the bytes: they stay for as long as it holds its job.
    """
    if storage_keys:
        now = database_now(session)
        session.add_all([UnneededBlob(storage_key=key, next_try_at=now, lease_token=lease_token) for key in storage_keys])
        session.flush()


def take_unneeded(*, session: Session, limit: int = 100, now: datetime | None = None) -> list[str]:
    """Keys whose bytes are to be deleted now, the longest due first. Several workers may ask at once: each key is taken by one. It is due
    again after a pause, unless `forget_unneeded` or `release_unneeded` is called for it."""
    now = now or database_now(session)
    is_held = exists().where(Job.lease_token == UnneededBlob.lease_token, Job.state == JobState.RUNNING)
    due = select(UnneededBlob).where(UnneededBlob.next_try_at <= now, ~is_held).order_by(UnneededBlob.next_try_at, UnneededBlob.storage_key)
    taken = session.scalars(due.limit(limit).with_for_update(skip_locked=True)).all()
    for one in taken:
        one.next_try_at = now + timedelta(seconds=min(FIRST_RETRY_SECONDS * 2 ** min(one.num_tries, 30), LONGEST_RETRY_SECONDS))
        one.num_tries += 1
    session.flush()
    return [one.storage_key for one in taken]


def forget_unneeded(*, session: Session, storage_keys: Collection[str]) -> None:
    """Their bytes are gone, or known."""
    session.execute(delete(UnneededBlob).where(UnneededBlob.storage_key.in_(storage_keys)))


def release_unneeded(*, session: Session, storage_keys: Collection[str]) -> None:
    """They were taken, but not tried."""
    statement = update(UnneededBlob).where(UnneededBlob.storage_key.in_(storage_keys))
    session.execute(statement.values(next_try_at=database_now(session), num_tries=UnneededBlob.num_tries - 1))
