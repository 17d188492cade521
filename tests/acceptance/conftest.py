"""The embedded service with leases short enough for tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from service.client import Client
from service.embedded import EmbeddedStack
from tests.live import SHORT_LEASES, Jobs
from tests.tiny import write_shards


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
    with EmbeddedStack(folder / "home", port=0, environment=SHORT_LEASES | roots) as stack, Client(stack.url) as client:
        yield Service(stack, client, shards)
