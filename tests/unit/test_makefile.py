"""What the Makefile hands on, without running it."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest


@pytest.mark.parametrize(
    ("arguments", "handed_on"),
    [
        ([], "--port 8000 --host 127.0.0.1"),
        (["PORT=8001"], "--port 8001 --host 127.0.0.1"),
        (["HOST=0.0.0.0"], "--port 8000 --host 0.0.0.0"),
    ],
)
def test_up_takes_a_port_and_a_host(arguments: list[str], handed_on: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for inherited in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS"):  # of the make that runs the tests
        monkeypatch.delenv(inherited, raising=False)
    for name in ("PORT", "HOST"):  # by which much else is told
        monkeypatch.setenv(name, "9")
    repository = Path(__file__).parents[2]
    told = subprocess.run(
        ["make", "--no-print-directory", "--dry-run", "up", *arguments], cwd=repository, capture_output=True, text=True, check=True
    ).stdout
    assert told.splitlines()[-1].endswith(f"cliprd up {handed_on}")
