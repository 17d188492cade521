"""API keys: what is known of each. A key itself is shown once, when it is made, and stored nowhere.

A key is 256 random bits, so the plain SHA-256 that stands for it can't be turned back by guessing, however fast a guess is: slow, salted
hashes are for passwords, which people choose. One pass also keeps the look-up of every request cheap, by a unique index.
"""

from __future__ import annotations

import hashlib
import secrets
import uuid
from collections.abc import Sequence
from datetime import timedelta

from sqlalchemy import or_, select, update
from sqlalchemy.orm import Session

from service.store.errors import KeyNotFoundError
from service.store.models import ApiKey
from service.store.scopes import KeyScope
from service.store.session import database_now

__all__ = ["ApiKey", "KeyScope", "any_keys", "create_key", "find_key", "is_use_stale", "list_keys", "mark_used", "revoke_key"]

KEY_PREFIX = "cliprd_"
"""Begins every key, so that people and scanners of leaked secrets know one when they see it."""

NUM_RANDOM_BYTES = 32
USED_EVERY = timedelta(minutes=5)
"""How exact `last_used_at` is: a write at each request would make every read wait for the database's writers."""


def create_key(*, session: Session, name: str, scope: KeyScope) -> tuple[ApiKey, str]:
    """Store a new key.

    Returns:
        What is stored of it, and the key itself, which can't be had again.
    """
    key = KEY_PREFIX + secrets.token_urlsafe(NUM_RANDOM_BYTES)
    stored = ApiKey(id=uuid.uuid4().hex[:12], name=name, scope=scope, key_hash=_hash(key), created_at=database_now(session))
    session.add(stored)
    session.flush()
    return stored, key


def find_key(*, session: Session, key: str) -> ApiKey | None:
    """The key of a request; None if it was never made, or was revoked."""
    return session.scalars(select(ApiKey).where(ApiKey.key_hash == _hash(key), ApiKey.revoked_at.is_(None))).one_or_none()


def any_keys(*, session: Session) -> bool:
    """Whether a key was ever made. Revoked ones count: revoking the last one must not open the service to everyone."""
    return session.scalar(select(ApiKey.id).limit(1)) is not None


def list_keys(*, session: Session) -> Sequence[ApiKey]:
    """All keys, revoked ones too, oldest first."""
    return session.scalars(select(ApiKey).order_by(ApiKey.created_at, ApiKey.id)).all()


def revoke_key(*, session: Session, key_id: str) -> ApiKey:
    """Make a key invalid for good. Revoking it again changes nothing.

    Raises:
        KeyNotFoundError: there is no key of this id.
    """
    stored = session.get(ApiKey, key_id)
    if stored is None:
        raise KeyNotFoundError(key_id)
    stored.revoked_at = stored.revoked_at or database_now(session)
    return stored


def is_use_stale(stored: ApiKey, *, session: Session) -> bool:
    """Whether its time of last use is so old that it should be written again."""
    return stored.last_used_at is None or stored.last_used_at < database_now(session) - USED_EVERY


def mark_used(*, session: Session, key_id: str) -> None:
    """Record that the key was used just now, unless that is on record already."""
    now = database_now(session)
    stale = or_(ApiKey.last_used_at.is_(None), ApiKey.last_used_at < now - USED_EVERY)
    session.execute(update(ApiKey).where(ApiKey.id == key_id, stale).values(last_used_at=now).execution_options(synchronize_session=False))


def _hash(key: str) -> str:
    return hashlib.sha256(key.encode("utf-8", "replace")).hexdigest()
