"""The embedded service, which looks often enough for tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from service.client import Client
from service.embedded import EmbeddedStack
from tests.live import SHORT_LEASES, Jobs
from tests.tiny import write_shards

SETTINGS = SHORT_LEASES | {"CLIPRD_LEASE_SECONDS": "120"}
"""No test here waits for a lease to run out, so it outlasts any time for which a machine is too busy to renew it."""
TEST_SECONDS = 900


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Whole jobs take long where others are at work, too, and a test waits for several."""
    for item in items:
        if item.path.parent == Path(__file__).parent and item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(TEST_SECONDS))


class Service(Jobs):
    """The running service as a user and an operator see it."""

    def __init__(self, stack: EmbeddedStack, client: Client, shards: str) -> None:
        super().__init__(client, shards, Path(stack.environment["CLIPRD_RUNS_ROOT"]))
        self.stack = stack


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    folder = tmp_path_factory.mktemp("service")
    shards = write_shards(folder / "shards", 32)
    roots = {"CLIPRD_DATA_ROOTS": str(tmp_path_factory.getbasetemp())}
    with EmbeddedStack(folder / "home", port=0, environment=SETTINGS | roots) as stack, Client(stack.url) as client:
        yield Service(stack, client, shards)
