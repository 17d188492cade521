"""API keys in the store, on SQLite and PostgreSQL."""

from __future__ import annotations

from datetime import timedelta

import pytest
from sqlalchemy import update

from service.store import keys
from service.store.errors import KeyNotFoundError
from service.store.models import ApiKey
from service.store.scopes import KeyScope
from service.store.session import database_now, reading
from tests.store_helpers import Sessions


def create(sessions: Sessions, scope: KeyScope = KeyScope.READ) -> tuple[ApiKey, str]:
    with sessions.begin() as session:
        return keys.create_key(session=session, name="a colleague", scope=scope)


def find(sessions: Sessions, key: str) -> ApiKey | None:
    with reading(sessions) as session:
        return keys.find_keys(session=session, keys=[key]).get(key)


def test_a_key_is_found_by_itself_and_not_stored(sessions: Sessions) -> None:
    stored, key = create(sessions, KeyScope.SUBMIT)
    found = find(sessions, key)
    assert found is not None
    assert (found.id, found.name, found.scope) == (stored.id, "a colleague", KeyScope.SUBMIT)
    assert key.removeprefix(keys.KEY_PREFIX) not in repr(vars(found))
    assert find(sessions, key[:-1]) is None
    assert find(sessions, stored.key_hash) is None
    assert find(sessions, "\ud800") is None
    assert create(sessions)[1] != key


def test_several_keys_are_found_at_once(sessions: Sessions) -> None:
    made = [create(sessions) for _ in range(3)]
    with sessions.begin() as session:
        keys.revoke_key(session=session, key_id=made[0][0].id)
    given = [key for _, key in made]
    with reading(sessions) as session:
        found = keys.find_keys(session=session, keys={*given, "cliprd_unknown"})
        assert keys.find_keys(session=session, keys=set()) == {}
    assert {key: stored.id for key, stored in found.items()} == {key: stored.id for stored, key in made[1:]}


def test_a_revoked_key_is_never_found_again_but_stays_on_record(sessions: Sessions) -> None:
    with reading(sessions) as session:
        assert not keys.any_keys(session=session)
    stored, key = create(sessions)
    for _ in range(2):
        with sessions.begin() as session:
            revoked_at = keys.revoke_key(session=session, key_id=stored.id).revoked_at
    assert find(sessions, key) is None
    with reading(sessions) as session:
        assert keys.any_keys(session=session)
        assert [(one.id, one.revoked_at) for one in keys.list_keys(session=session)] == [(stored.id, revoked_at)]
    with pytest.raises(KeyNotFoundError, match="keys list"), sessions.begin() as session:
        keys.revoke_key(session=session, key_id="nothing")


def test_the_last_use_is_written_now_and_then(sessions: Sessions) -> None:
    stored, key = create(sessions)
    with sessions.begin() as session:
        assert keys.stale_keys(session=session, keys=[stored]) == [stored.id]
        keys.mark_used(session=session, key_ids=[stored.id])
    first = find(sessions, key)
    with sessions.begin() as session:
        assert first is not None
        assert keys.stale_keys(session=session, keys=[first]) == []
        keys.mark_used(session=session, key_ids=[stored.id])
    second = find(sessions, key)
    assert second is not None
    assert second.last_used_at == first.last_used_at is not None
    with sessions.begin() as session:
        session.execute(update(ApiKey).values(last_used_at=database_now(session) - keys.USED_EVERY - timedelta(seconds=1)))
        keys.mark_used(session=session, key_ids=[stored.id])
    third = find(sessions, key)
    assert third is not None
    assert third.last_used_at is not None
    assert third.last_used_at >= first.last_used_at
