"""Whether the API may listen on an address: other machines are not let in by mistake, before there is a key."""

from __future__ import annotations

from service.auth import is_loopback
from service.store.keys import any_keys
from service.store.session import make_engine, make_sessions, migrate, reading


def exposure_problem(host: str, *, database_url: str, may_migrate: bool) -> str | None:
    """Why the API can't listen on `host` yet, and what to do; None: it can.

    Args:
        host: Name or address, without port.
        database_url: Of the service's keys.
        may_migrate: Bring the database to the newest schema before the look, as it may be new.
    """
    if is_loopback(host):
        return None
    if may_migrate:
        migrate(database_url)
    engine = make_engine(database_url)
    try:
        with reading(make_sessions(engine)) as session:
            has_keys = any_keys(session=session)
    finally:
        engine.dispose()
    return None if has_keys else f"{host} can be reached from other machines, but no API key has been made yet"
