"""API keys: what is known of each. A key itself is shown once, when it is made, and stored nowhere.

A key is 256 random bits, so the plain SHA-256 that stands for it can't be turned back by guessing, however fast a guess is: slow, salted
hashes are for passwords, which people choose. One pass also keeps the look-up of every request cheap, by a unique index.
"""

from __future__ import annotations

import hashlib
import secrets
import uuid
from collections.abc import Collection, Sequence
from datetime import timedelta

from sqlalchemy import or_, select, update
from sqlalchemy.orm import Session

from service.store.errors import KeyNotFoundError
from service.store.models import ApiKey
from service.store.scopes import KeyScope
from service.store.session import database_now

__all__ = ["ApiKey", "KeyScope", "any_keys", "create_key", "find_keys", "list_keys", "mark_used", "revoke_key", "stale_keys"]

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


def find_keys(*, session: Session, keys: Collection[str]) -> dict[str, ApiKey]:
    """What is stored of the keys of requests. Those that were never made, or were revoked, are not in it."""
    if not keys:
        return {}
    query = select(ApiKey).where(ApiKey.key_hash.in_([_hash(key) for key in keys]), ApiKey.revoked_at.is_(None))
    by_hash = {stored.key_hash: stored for stored in session.scalars(query)}
    return {key: by_hash[_hash(key)] for key in keys if _hash(key) in by_hash}


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


def stale_keys(*, session: Session, keys: Collection[ApiKey]) -> list[str]:
    """Ids of those whose time of last use is so old that it should be written again."""
    if not keys:
        return []
    limit = database_now(session) - USED_EVERY
    return sorted(one.id for one in keys if one.last_used_at is None or one.last_used_at < limit)


def mark_used(*, session: Session, key_ids: Sequence[str]) -> None:
    """Record that the keys were used just now, unless that is on record already."""
    now = database_now(session)
    stale = or_(ApiKey.last_used_at.is_(None), ApiKey.last_used_at < now - USED_EVERY)
    # One by one, in the same order everywhere: an UPDATE of several rows locks them in any order.
    for key_id in key_ids:
        statement = update(ApiKey).where(ApiKey.id == key_id, stale).values(last_used_at=now)
        session.execute(statement.execution_options(synchronize_session=False))


def _hash(key: str) -> str:
    return hashlib.sha256(key.encode("utf-8", "replace")).hexdigest()
