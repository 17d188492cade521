"""`python -m tests.chaos [NAME…]`: play the scenarios whose names contain one of these words, or all, and print one table of it."""

from __future__ import annotations

import argparse
import os
import random
import shutil
import sys
import tempfile
from pathlib import Path

from tests.chaos.lab import Bench
from tests.chaos.report import processor, table
from tests.chaos.scenario import SCENARIOS, Row, Scenario, play
from tests.chaos.scenarios import with_undisturbed
from tests.postgres_server import PostgresServer
from tests.tiny import write_shards


def main() -> int:
    given = parse()
    if given.list:
        print("\n".join(f"{one.name:28} {one.fault}" for one in SCENARIOS.values()))
        return 0
    chosen = choose(given.names)
    if not chosen:
        print(f"no scenario's name contains any of {given.names}; `--list` shows them", file=sys.stderr)
        return 2
    print(f"{len(chosen)} scenarios, seed {given.seed}, on {len(os.sched_getaffinity(0))} cores of {processor()}", file=sys.stderr)
    folder = Path(tempfile.mkdtemp(prefix="cliprd-chaos-"))
    rows = []
    with PostgresServer() as postgres:
        shards = write_shards(folder / "shards", 32)
        bench = Bench(postgres, folder, shards, outage_seconds=given.outage_seconds, seed=given.seed)
        for one in chosen:
            rows.append(play(one, bench))
            tell(rows[-1])
    print(table(rows))
    skipped = [row.scenario.name for row in rows if row.skipped]
    if skipped:
        print(f"not played on this machine: {', '.join(skipped)}", file=sys.stderr)
    if all(row.is_good for row in rows) and not (given.strict and skipped):
        shutil.rmtree(folder)
        return 0
    print(f"logs and run directories of what failed are in {folder}", file=sys.stderr)
    return 1


def choose(words: list[str]) -> list[Scenario]:
    """Those asked for, after the undisturbed runs that they are compared with."""
    asked = [one for name, one in SCENARIOS.items() if not words or any(word in name for word in words)]
    return with_undisturbed(asked)


def tell(row: Row) -> None:
    """While the suite runs."""
    word = "skipped" if row.skipped else "ok" if row.is_good else "FAILED"
    told = f"{word:8} {row.scenario.name:28} {row.seconds:5.1f} s  {row.skipped or row.what}"
    print(told, *row.problems, sep="\n    ", file=sys.stderr, flush=True)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="words of scenarios' names; none: all scenarios")
    parser.add_argument("--list", action="store_true", help="only list the scenarios")
    parser.add_argument("--strict", action="store_true", help="what can't be played on this machine counts as failed")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6), help="decides at which moments faults hit")
    parser.add_argument("--outage-seconds", type=float, default=60.0, help="how long Redis and PostgreSQL are away (default: 60)")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
