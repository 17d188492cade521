"""`cliprd migrate`, and what commands share that work on the service's database itself."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from service.cli_common import fail, out

# Imported where used: the store, which takes longer to load than `cliprd --help` should.

app = typer.Typer()

Database = Annotated[
    str | None,
    typer.Option(
        help="The service's database.  [default: that of CLIPRD_DATABASE_URL or CLIPRD_DATABASE_URL_FILE, or of `cliprd up` in this folder]"
    ),
]


@app.command()
def migrate(database: Database = None) -> None:
    """Bring the service's database to this version's schema: once, before new versions of API and workers start."""
    with migrated(database):
        out.print("The database has the newest schema.")


@contextmanager
def migrated(database: str | None, *, must_exist: bool = False) -> Iterator[str]:
    """The address of the service's database, which is brought to the newest schema first; its errors end the command.

    `must_exist`: refuse to make the file of an embedded service that was never started in this folder, and that nobody has named.
    """
    from sqlalchemy.exc import SQLAlchemyError

    from service.settings import Settings
    from service.store.session import migrate as bring_to_newest

    try:
        url = database or Settings().database_url
        embedded = Settings.model_fields["database_url"].default
        if must_exist and database is None and url == embedded and not Path(embedded.removeprefix("sqlite:///")).exists():
            fail(
                "no service keeps its database in this folder. Run this where `cliprd up` runs, or name the database, which"
                " `cliprd up --home HOME` has in HOME: `--database sqlite:///HOME/cliprd.db`, or CLIPRD_DATABASE_URL"
            )
        bring_to_newest(url)
        yield url
    except (SQLAlchemyError, ValueError) as error:
        fail(f"the database can't be used: {next(iter(str(error).splitlines()), error)}; look at CLIPRD_DATABASE_URL")
