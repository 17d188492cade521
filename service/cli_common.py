"""What the commands share: output, arguments, a client whose errors end the command."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich.console import Console

if TYPE_CHECKING:
    from service.client import Client

# Imported where used: service.client, which takes longer than `cliprd --help` should.

out = Console(highlight=False)
errors = Console(stderr=True, highlight=False)


def _nearest(context: typer.Context, url: str) -> str:
    """The `--url` that stands nearest to the command: of its own, or of a command before it; else the environment's, or the default."""
    at: Any = context
    while at is not None:
        source = at.get_parameter_source("url")
        if source is not None and source.name == "COMMANDLINE":
            return url if at is context else str(at.params["url"])
        at = at.parent
    return url


Url = Annotated[str, typer.Option(envvar="CLIPRD_URL", callback=_nearest, help="Address of the service.")]
JobId = Annotated[str, typer.Argument(help="Id of the job, in full.", show_default=False)]
DEFAULT_URL = "http://127.0.0.1:8000"


def json_object(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text())
    except ValueError as error:
        fail(f"{file} is not JSON: {error}")
    if not isinstance(content, dict):
        fail(f"{file} must hold a JSON object")
    return content


def key_and_value(label: str) -> tuple[str, str]:
    key, equals, value = label.partition("=")
    if not (key and equals):
        fail(f"--label {label}: write it as key=value")
    return key, value


@contextmanager
def connected(url: str) -> Iterator[Client]:
    """A client whose errors end the command with one clear message."""
    from service.client import Client, CliprdError

    try:
        with Client(url) as client:
            yield client
    except CliprdError as error:
        fail(str(error))
    except KeyboardInterrupt:
        sys.exit(130)  # as the shell expects after Ctrl-C


def fail(message: str) -> NoReturn:
    errors.print(f"cliprd: {message}", style="red" if errors.is_terminal else None, soft_wrap=True, markup=False)
    raise typer.Exit(1)
