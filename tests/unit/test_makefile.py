"""What the Makefile hands on, without running it."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest


@pytest.mark.parametrize(("arguments", "port"), [([], "8000"), (["PORT=8001"], "8001")])
def test_up_takes_a_port(arguments: list[str], port: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for inherited in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS"):  # of the make that runs the tests
        monkeypatch.delenv(inherited, raising=False)
    monkeypatch.setenv("PORT", "9")  # which much else is told by, and means another program
    repository = Path(__file__).parents[2]
    told = subprocess.run(
        ["make", "--no-print-directory", "--dry-run", "up", *arguments], cwd=repository, capture_output=True, text=True, check=True
    ).stdout
    assert told.splitlines()[-1].endswith(f"cliprd up --port {port}")
