"""Tables whose ids can be copied, and whose lines a program can read."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

MIN_WIDTH = 12
"""Of a column that is wrapped, in characters, if it holds as many."""
PADDING = 1


def print_table(
    console: Console, rows: Iterable[Sequence[str]], *, headings: Sequence[str], ids: Sequence[str] = (), show_headings: bool = True
) -> None:
    """Print `rows` below `headings`. Columns named in `ids` are neither wrapped nor cut, however narrow the terminal is; where the output
    is no terminal, none is."""
    rows = [*rows]
    table = Table(box=None, pad_edge=False, padding=(0, PADDING), show_header=show_headings)
    needed = 0
    for index, heading in enumerate(headings):
        width = max(cell_len(cell) for cell in (heading, *(row[index] for row in rows)))
        is_whole = heading in ids or not console.is_terminal
        least = width if is_whole else min(width, MIN_WIDTH)
        table.add_column(heading, no_wrap=is_whole, min_width=least)
        needed += least + 2 * PADDING
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))  # not markup: users' names are among them
    console.print(_Rendered(table, max(needed, console.width)), crop=False)


@dataclass(frozen=True)
class _Rendered:
    """A table as on a console of some width, in characters; a narrower one breaks its lines itself."""

    table: Table
    width: int

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield from console.render(self.table, options.update(width=self.width))
