"""The one table, as Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tests.chaos.invariants import INVARIANTS
from tests.chaos.scenario import Row


def table(rows: Sequence[Row]) -> str:
    """A line for each scenario."""
    heads = ["scenario", "fault", "what happened", "recovery, s", *INVARIANTS, "took, s"]
    lines = [_line(heads), _line(["---"] * len(heads))]
    return "\n".join([*lines, *(_line(_cells(row)) for row in rows)])


def _cells(row: Row) -> list[str]:
    if row.skipped is not None:
        return [row.scenario.name, row.scenario.fault, f"skipped: {row.skipped}", "", *([""] * len(INVARIANTS)), ""]
    recovery = "" if row.recovery_seconds is None else f"{row.recovery_seconds:.1f}"
    held = [{True: "yes", False: "**NO**", None: "?"}[row.held.get(name)] for name in INVARIANTS]
    what = "; ".join([*([row.what] if row.what else []), *row.problems])
    return [row.scenario.name, row.scenario.fault, what, recovery, *held, f"{row.seconds:.0f}"]


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "/").replace("\n", " ") for cell in cells) + " |"


def processor() -> str:
    """What this machine computes with."""
    names = {line.partition(":")[2].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")}
    return ", ".join(sorted(names)) or "an unknown processor"
