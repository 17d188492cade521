"""Commands about teacher stores."""

from __future__ import annotations

from typing import Annotated

import typer

from service.cli_common import DEFAULT_URL, Url, connected, out
from service.cli_table import print_table

app = typer.Typer(help="List teacher stores, or delete one.", invoke_without_command=True)


@app.callback()
def stores(context: typer.Context, url: Url = DEFAULT_URL) -> None:
    """List teacher stores, most recently used first; `cliprd stores delete KEY` deletes one."""
    if context.invoked_subcommand is not None:
        return
    rows: list[tuple[str, ...]] = []
    with connected(url) as client:
        for store in client.teacher_stores():
            row = (
                store.key,
                store.teacher or "?",
                store.data or "?",
                f"{store.num_bytes_on_disk / 1e9:.2f} of {store.num_bytes / 1e9:.2f}",
                "?" if store.filled is None else f"{store.filled:.0%}",
                f"{store.hits:,}",
                f"{store.last_used_at.astimezone():%Y-%m-%d %H:%M}",
                "yes" if store.in_use else "no",
            )
            rows.append(row)
    headings = ("key", "teacher", "data", "GB", "filled", "hits", "last used", "in use")
    print_table(out, rows, headings=headings, ids=("key",))


@app.command("delete")
def delete_store(
    key: Annotated[str, typer.Argument(help="Key of the store, in full.", show_default=False)],
    url: Url = DEFAULT_URL,
) -> None:
    """Delete a teacher store and free its space. One that a run uses is refused."""
    with connected(url) as client:
        client.delete_teacher_store(key)
    out.print("deleted")
