"""`cliprd keys`: make, list and revoke API keys, in the database itself, so that whoever can write to it needs no key to make one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from service.cli_common import fail, out
from service.cli_database import Database, migrated
from service.cli_table import print_table
from service.store.scopes import KeyScope

if TYPE_CHECKING:
    from sqlalchemy.orm import Session

# Imported where used: the store, which takes longer to load than `cliprd --help` should.

keys = typer.Typer(help="Make, list and revoke API keys, in the service's database (CLIPRD_DATABASE_URL).", no_args_is_help=True)


@keys.command()
def create(
    scope: Annotated[KeyScope, typer.Option(help="What it allows; each scope includes those before it.")],
    name: Annotated[str, typer.Option(help="For people: who or what will use it.")],
    database: Database = None,
) -> None:
    """Make a key and print it: it is shown this once. From the first key on, every request needs one."""
    from service.store.keys import create_key

    if not 1 <= len(name) <= 128:
        fail("--name takes 1 to 128 characters")
    with _session(database) as session:
        stored, key = create_key(session=session, name=name, scope=scope)
    Console(stderr=True, highlight=False).print(
        f"Key {stored.id} of scope {scope}. It is shown this once; give it to clients as CLIPRD_API_KEY.", soft_wrap=True
    )
    print(key)  # alone on standard output, for scripts


@keys.command("list")
def list_(database: Database = None) -> None:
    """List keys, without the keys themselves, which are not stored."""
    from service.store.keys import list_keys

    rows: list[tuple[str, ...]] = []
    with _session(database) as session:
        for one in list_keys(session=session):
            used = "never" if one.last_used_at is None else _shown(one.last_used_at)
            rows.append((one.id, one.name, str(one.scope), _shown(one.created_at), used, "valid" if one.revoked_at is None else "revoked"))
    print_table(out, rows, headings=("id", "name", "scope", "made", "last used", "state"), ids=("id",))


@keys.command()
def revoke(
    key_id: Annotated[str, typer.Argument(help="Id of the key, as `cliprd keys list` shows it.")], database: Database = None
) -> None:
    """Make a key invalid, at once and for good."""
    from service.store.errors import KeyNotFoundError
    from service.store.keys import revoke_key

    try:
        with _session(database) as session:
            name = revoke_key(session=session, key_id=key_id).name
    except KeyNotFoundError as error:
        fail(str(error))
    out.print(f"revoked: {name}", markup=False)


@contextmanager
def _session(database: str | None) -> Iterator[Session]:
    """A transaction in the service's database, which is brought to the newest schema first. A key of no service would open nothing."""
    from service.store.session import make_engine, make_sessions

    with migrated(database, must_exist=True) as url:
        engine = make_engine(url)
        try:
            with make_sessions(engine).begin() as session:
                yield session
        finally:
            engine.dispose()


def _shown(time: datetime) -> str:
    return f"{time:%Y-%m-%d %H:%M} UTC"
