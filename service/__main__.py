"""`python -m service`: the API on its own, on the address of its settings."""

from __future__ import annotations

import gc
import sys

import uvicorn

from service.app import create_app
from service.auth import is_loopback
from service.settings import Settings
from service.store.keys import any_keys
from service.store.session import make_engine, make_sessions, migrate, reading


def main() -> None:
    """Serve until interrupted."""
    settings = Settings()
    if not is_loopback(settings.host) and not settings.always_need_key:  # which lets nobody in before there is a key
        _insist_on_a_key(settings)
    app = create_app(settings)
    gc.freeze()  # what is there now stays, and a busy process would look through it for garbage again and again
    uvicorn.run(app, host=settings.host, port=settings.port, timeout_graceful_shutdown=settings.shutdown_seconds)


def _insist_on_a_key(settings: Settings) -> None:
    """Other machines are not let in by mistake: an address that they reach needs a key first."""
    if settings.migrate_on_start:
        migrate(settings.database_url)
    engine = make_engine(settings.database_url)
    try:
        with reading(make_sessions(engine)) as session:
            has_keys = any_keys(session=session)
    finally:
        engine.dispose()
    if not has_keys:
        sys.exit(
            f"cliprd: CLIPRD_HOST={settings.host} can be reached from other machines, but no API key has been made yet."
            " Make one with `cliprd keys create --scope admin --name NAME`, leave CLIPRD_HOST at 127.0.0.1,"
            " or set CLIPRD_ALWAYS_NEED_KEY=true to refuse every request until then."
        )


if __name__ == "__main__":
    main()
