"""Tables of the command: ids that can be copied from a narrow terminal, lines that a program can read."""

from __future__ import annotations

import io
import uuid

import pytest
from rich.console import Console

from service.cli_table import print_table

ROWS = [(str(uuid.uuid4()), "a name of [some] words, and then some more", str(uuid.uuid4()), "not_consuming: " + "why " * 30)] * 2


def printed(*, is_terminal: bool, width: int = 80) -> str:
    written = io.StringIO()
    console = Console(file=written, force_terminal=is_terminal, width=width, color_system=None)
    print_table(console, ROWS, headings=("id", "name", "job", "state"), ids=("id", "job"))
    return written.getvalue()


@pytest.mark.parametrize("width", [20, 80, 400])
def test_ids_are_whole_on_any_terminal(width: int) -> None:
    text = printed(is_terminal=True, width=width)
    for row in ROWS:
        assert row[0] in text
        assert row[2] in text


def test_elsewhere_a_row_is_a_line() -> None:
    heading, *lines = printed(is_terminal=False).splitlines()
    assert heading.split() == ["id", "name", "job", "state"]
    assert [line.split(maxsplit=1)[0] for line in lines] == [row[0] for row in ROWS]
    assert all(cell.strip() in line for line, row in zip(lines, ROWS, strict=True) for cell in row)


def test_on_a_terminal_the_rest_is_wrapped() -> None:
    assert len(printed(is_terminal=True).splitlines()) > 1 + len(ROWS)
