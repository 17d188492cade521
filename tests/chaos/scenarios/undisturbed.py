"""No fault: what the others are compared with."""

from __future__ import annotations

from tests.chaos.lab import Lab
from tests.chaos.scenario import SCENARIOS, Scenario, scenario


@scenario("undisturbed", "none; a job of one training process")
def undisturbed(lab: Lab) -> None:
    lab.train()


@scenario("undisturbed-two-ranks", "none; a job of two training processes", num_processes=2)
def undisturbed_two_ranks(lab: Lab) -> None:
    lab.train()


UNDISTURBED = {one.num_processes: one for one in SCENARIOS.values() if one.play in (undisturbed, undisturbed_two_ranks)}
"""By number of training processes."""


def with_undisturbed(chosen: list[Scenario]) -> list[Scenario]:
    """These, after the undisturbed runs that they are compared with."""
    first = [UNDISTURBED[number] for number in sorted({one.num_processes for one in chosen})]
    return [*first, *(one for one in chosen if one not in first)]
