"""Bytes in the blob store that no artifact names any more.

Their keys are noted in the transaction that removes the artifacts. Whoever does that may delete the bytes at once; where it fails or
crashes, a reaper does.
"""

from __future__ import annotations

from collections.abc import Collection

from sqlalchemy import delete, select
from sqlalchemy.orm import Session

from service.store.models import UnneededBlob


def note_unneeded(*, session: Session, storage_keys: Collection[str]) -> None:
    """Have the bytes under these keys, each of which only one artifact ever had, deleted some time after the commit."""
    session.add_all([UnneededBlob(storage_key=key) for key in storage_keys])
    session.flush()


def unneeded_keys(*, session: Session, limit: int = 1000) -> list[str]:
    """Keys whose bytes are to be deleted."""
    return list(session.scalars(select(UnneededBlob.storage_key).limit(limit)))


def forget_unneeded(*, session: Session, storage_keys: Collection[str]) -> None:
    """Their bytes are gone."""
    session.execute(delete(UnneededBlob).where(UnneededBlob.storage_key.in_(storage_keys)))
