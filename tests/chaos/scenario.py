"""Scenarios by name, and how one is played: start a stack, let the fault happen, look at the invariants, take the stack down."""

from __future__ import annotations

import random
import shutil
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from service.client import Client
from tests.chaos.invariants import INVARIANTS, reference_of
from tests.chaos.lab import Bench, Lab, SkippedError
from tests.chaos.stack import Stack
from tests.chaos.story import story_of
from tests.chaos.trainers import Census, TrainerWatch
from tests.chaos.witness import Witness
from tests.live import eventually

Settings = Mapping[str, str] | Callable[[Bench], Mapping[str, str]]
"""`CLIPRD_…` of a stack."""
Around = Callable[[Bench, Path], AbstractContextManager[Any]]
"""What stands around the stack whose home is that folder."""
Play = Callable[[Lab], str | None]
"""Makes the fault happen; returns a remark for the table."""


@dataclass(frozen=True)
class Scenario:
    """One fault."""

    name: str
    fault: str
    """For the table."""
    play: Play
    settings: Settings
    are_apart: bool
    num_processes: int
    around: Around


@dataclass
class Row:
    """One line of the table."""

    scenario: Scenario
    what: str = ""
    recovery_seconds: float | None = None
    seconds: float = 0.0
    held: dict[str, bool] = field(default_factory=dict)
    """By invariant."""
    problems: list[str] = field(default_factory=list)
    skipped: str | None = None
    """Why it was not played."""

    @property
    def is_good(self) -> bool:
        return self.skipped is not None or (not self.problems and all(self.held.values()))


SCENARIOS: dict[str, Scenario] = {}
"""All there are, in order of their definition."""


def nothing(_bench: Bench, _home: Path) -> AbstractContextManager[object]:
    """Nothing stands around the stack."""
    return nullcontext()


def scenario(
    name: str, fault: str, *, settings: Settings | None = None, are_apart: bool = False, num_processes: int = 1, around: Around = nothing
) -> Callable[[Play], Play]:
    """Register the decorated function under a name.

    Args:
        name: What it is called on the command line.
        fault: What is injected, for the table.
        settings: `CLIPRD_…` of the stack.
        are_apart: The workers have run directories of their own, as on two machines.
        num_processes: That train, of each job.
        around: Entered before the stack starts, and left once it is down.
    """

    def register(play: Play) -> Play:
        assert name not in SCENARIOS, f"there is a scenario {name} already"
        SCENARIOS[name] = Scenario(name, fault, play, settings or {}, are_apart, num_processes, around)
        return play

    return register


def play(chosen: Scenario, bench: Bench) -> Row:
    """Play it. The folder with the logs stays where something was wrong."""
    row = Row(chosen)
    home = bench.folder / chosen.name
    started = time.monotonic()
    try:
        with open_lab(chosen, bench, home) as lab:
            mark = lab.stack.mark
            row.what = "; ".join(part for part in (chosen.play(lab), *finish_all(lab)) if part)
            row.recovery_seconds = lab.recovery_seconds()
            for name, check in INVARIANTS.items():
                faults = check(lab)
                row.held[name] = not faults
                row.problems += faults
        eventually(lambda: not Census(mark).take() or None, bench.stray_seconds)
    except SkippedError as error:
        row.skipped = str(error)
    except Exception as error:
        row.problems.append(f"{type(error).__name__}: {error}")
        (home / "traceback.txt").write_text(traceback.format_exc())
    row.seconds = time.monotonic() - started
    if row.is_good:
        shutil.rmtree(home, ignore_errors=True)
    return row


def finish_all(lab: Lab) -> list[str]:
    """Wait until all jobs have succeeded; what happened to each of them."""
    stories = []
    for job_id in lab.jobs:
        lab.finish(job_id)
        lab.witness.wait_for_end(job_id)
        lab.bench.references.setdefault(lab.num_processes, reference_of(lab, job_id))  # the first one of its kind is undisturbed
        stories.append(story_of(lab, job_id))
    return list(dict.fromkeys(stories))


@contextmanager
def open_lab(chosen: Scenario, bench: Bench, home: Path) -> Iterator[Lab]:
    """A stack with those who watch it."""
    rng = random.Random(f"{bench.seed} {chosen.name}")
    settings = chosen.settings(bench) if callable(chosen.settings) else chosen.settings
    stack = Stack(home, bench.postgres, bench.folder, settings={**bench.settings, **settings}, are_apart=chosen.are_apart, rng=rng)
    home.mkdir()
    with (
        chosen.around(bench, home) as around,
        stack,
        Client(stack.url, api_key="") as client,
        TrainerWatch(stack.mark) as watch,
        Witness(stack.url) as witness,
    ):
        yield Lab(bench, stack, client, num_processes=chosen.num_processes, watch=watch, witness=witness, rng=rng, around=around)
