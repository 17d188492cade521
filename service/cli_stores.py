"""Commands about teacher stores."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.table import Table

from service.cli_common import DEFAULT_URL, Url, connected, out

app = typer.Typer(help="List teacher stores, or delete one.", invoke_without_command=True)


@app.callback()
def stores(context: typer.Context, url: Url = DEFAULT_URL) -> None:
    """List teacher stores, most recently used first; `cliprd stores delete KEY` deletes one."""
    if context.invoked_subcommand is not None:
        return
    table = Table("key", "teacher", "data", "GB", "filled", "hits", "last used", "in use", box=None, pad_edge=False)
    table.columns[0].no_wrap = True
    with connected(url) as client:
        for store in client.teacher_stores():
            table.add_row(
                store.key,
                store.teacher or "?",
                store.data or "?",
                f"{store.num_bytes_on_disk / 1e9:.2f} of {store.num_bytes / 1e9:.2f}",
                "?" if store.filled is None else f"{store.filled:.0%}",
                f"{store.hits:,}",
                f"{store.last_used_at.astimezone():%Y-%m-%d %H:%M}",
                "yes" if store.in_use else "no",
            )
    out.print(table)


@app.command("delete")
def delete_store(
    key: Annotated[str, typer.Argument(help="Key of the store, in full.", show_default=False)],
    url: Url = DEFAULT_URL,
) -> None:
    """Delete a teacher store and free its space. One that a run uses is refused."""
    with connected(url) as client:
        client.delete_teacher_store(key)
    out.print("deleted")
