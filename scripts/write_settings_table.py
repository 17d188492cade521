"""Write the table of all settings into docs/deploy.md, from the settings' own classes. `--check`: only say whether it is current.

A setting that the API and the workers share stands once, with what the API's class says of it. Below stand what the trainer reads that is
no setting of its worker, and what the `cliprd` command and the Python client read.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import typer
from pydantic.fields import FieldInfo

from cliprd_core.connections import DEFAULT_PEER_TIMEOUT_SECONDS, PEER_TIMEOUT_VARIABLE
from service.cli import app
from service.client import API_KEY_VARIABLE
from service.settings import Settings
from worker.settings import WorkerSettings

DOCUMENT = Path("docs/deploy.md")
BEGIN = "<!-- settings: written by `make settings`, from the code that reads them -->\n"
END = "<!-- end of settings -->\n"


@dataclass(frozen=True)
class Row:
    """One variable, as the table shows it."""

    variable: str
    read_by: str
    default: str
    description: str

    def __str__(self) -> str:
        escaped = self.description.replace("|", r"\|")
        return f"| `{self.variable}` | {self.read_by} | {self.default} | {escaped} |"


def table() -> str:
    """All settings as a Markdown table, the shared ones first."""
    rows = [*settings(), *of_the_trainer(), *of_the_client()]
    return "\n".join(["| variable | read by | default | what it does |", "|---|---|---|---|", *map(str, rows)]) + "\n"


def settings() -> list[Row]:
    api, worker = Settings.model_fields, WorkerSettings.model_fields
    readers = {name: "both" if name in worker else "API" for name in api} | {name: "worker" for name in worker if name not in api}
    rows = []
    for name, reader in readers.items():
        field: FieldInfo = api.get(name) or worker[name]
        rows.append(Row(f"CLIPRD_{name.upper()}", reader, as_variable(field.default), field.description or ""))
    return sorted(rows, key=lambda row: ["both", "API", "worker"].index(row.read_by))


def of_the_trainer() -> Iterator[Row]:
    description = "Seconds of silence after which another machine of the same run counts as lost."
    yield Row(PEER_TIMEOUT_VARIABLE, "trainer", as_variable(DEFAULT_PEER_TIMEOUT_SECONDS), description)


def of_the_client() -> Iterator[Row]:
    yield Row(API_KEY_VARIABLE, "client", "none", "API key that the `cliprd` command and the Python client send.")
    options = {option.envvar: option for option in options_of(typer.main.get_command(app)) if option.envvar}
    for variable, option in sorted(options.items()):
        yield Row(variable, "`cliprd`", as_variable(option.default), option.help or "")


def options_of(command: Any) -> Iterator[Any]:
    """Of a click command and all below it."""
    yield from command.params
    for below in getattr(command, "commands", {}).values():
        yield from options_of(below)


def as_variable(default: object) -> str:
    """A default as one would write it into the environment."""
    value = default.value if isinstance(default, Enum) else default
    if value is None or value in ("", ()):
        return "none"
    if isinstance(value, tuple):
        return f"`{','.join(map(str, value))}`"
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    only_check = parser.parse_args().check
    before, _, rest = DOCUMENT.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    if not end:
        sys.exit(f"{DOCUMENT} lacks the two lines that the table stands between:\n{BEGIN}{END}")
    written = f"{before}{BEGIN}\n{table()}\n{END}{after}"
    if not only_check:
        DOCUMENT.write_text(written)
    elif written != DOCUMENT.read_text():
        sys.exit(f"{DOCUMENT}: the table of settings is not current; run `make settings`")


if __name__ == "__main__":
    main()
