"""Two scenarios of the chaos suite, of which `make chaos` plays all."""

from __future__ import annotations

import pytest

from tests.chaos.lab import Bench
from tests.chaos.scenario import SCENARIOS, play
from tests.chaos.scenarios import UNDISTURBED
from tests.postgres_server import PostgresServer
from tests.tiny import write_shards

SETTINGS = {"CLIPRD_LEASE_SECONDS": "15"}
"""None is to be lost but by the fault, also where the machine stands still for seconds."""


@pytest.fixture(scope="module")
def bench(postgres_server: PostgresServer, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """With the undisturbed run that the others are compared with."""
    folder = tmp_path_factory.mktemp("chaos")
    shards = write_shards(folder / "shards", 32)
    bench = Bench(postgres_server, folder, shards, outage_seconds=5.0, seed=0, settings=SETTINGS, stray_seconds=60.0)
    row = play(UNDISTURBED[1], bench)
    assert row.is_good, row.problems
    return bench


@pytest.mark.parametrize("name", ["worker-parent-killed", "connections-cut"])
def test_the_invariants_hold(bench: Bench, name: str) -> None:
    row = play(SCENARIOS[name], bench)
    assert row.is_good, row.problems
