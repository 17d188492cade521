"""`/readyz` for many who ask, and with parts that hang."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator

import pytest
from sqlalchemy.exc import OperationalError

from service import readiness
from service.app import create_app
from service.readiness import Part, Readiness
from service.settings import Settings
from tests.live import eventually
from tests.store_helpers import local_client

pytestmark = pytest.mark.usefixtures("patient_readiness")


class Store:
    """A part that can hang, or fail."""

    def __init__(self) -> None:
        self.num_checks = 0
        self.goes_on = threading.Event()
        self.goes_on.set()
        self.error: Exception | None = None

    def check(self) -> None:
        self.num_checks += 1
        self.goes_on.wait()
        if self.error is not None:
            raise self.error


@pytest.fixture
def store() -> Iterator[Store]:
    store = Store()
    yield store
    store.goes_on.set()


def readiness_of(store: Store, other: Callable[[], None] = lambda: None) -> Readiness:
    return Readiness({"other": Part(other, "-"), "store": Part(store.check, "Look at it.")})


def ask(asked: Readiness, times: int = 1) -> list[dict[str, str]]:
    """What many who ask at once are told: by part, what is wrong with it."""

    async def all_at_once() -> list[dict[str, str]]:
        return [{one.field: one.problem for one in told} for told in await asyncio.gather(*(asked.problems() for _ in range(times)))]

    return asyncio.run(all_at_once())


def test_one_look_serves_all_who_ask_until_it_is_old(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readiness, "READY_SECONDS", 3600.0)
    asked = readiness_of(store)
    assert ask(asked, 50) == [{}] * 50
    assert ask(asked) == [{}]
    assert store.num_checks == 1
    monkeypatch.setattr(readiness, "READY_SECONDS", 0.0)
    asked = readiness_of(store)
    for number in (2, 3):
        assert ask(asked) == [{}]
        assert store.num_checks == number


def test_a_failure_is_noticed_and_told_in_one_line_and_so_is_its_end(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("READY_SECONDS", "NOT_READY_SECONDS"):
        monkeypatch.setattr(readiness, name, 0.0)
    asked = readiness_of(store)
    store.error = OSError("it is gone\nand more")
    assert ask(asked) == [{"store": "it is gone"}]
    store.error = OSError()
    assert ask(asked) == [{"store": "OSError"}]
    store.error = OperationalError("SELECT 1", {}, Exception("no connection"))
    assert "no connection" in ask(asked)[0]["store"]
    store.error = None
    assert ask(asked) == [{}]
    store.error = ZeroDivisionError()
    with pytest.raises(ZeroDivisionError):
        ask(asked)


def test_a_part_that_hangs_has_failed_and_is_not_asked_again_meanwhile(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readiness, "LIMIT_SECONDS", 0.1)
    monkeypatch.setattr(readiness, "NOT_READY_SECONDS", 0.0)
    asked = Readiness({"store": Part(store.check, "Look at it.")})  # alone: a busy machine may not give another one its turn in time
    store.goes_on.clear()
    for _ in range(5):
        assert ask(asked, 10) == [{"store": "has not answered for 0.1 s"}] * 10
    assert store.num_checks == 1
    store.goes_on.set()
    eventually(lambda: ask(asked) == [{}] or None)


def test_who_gives_up_asking_does_not_take_the_answer_from_others(store: Store) -> None:
    asked = readiness_of(store)
    store.goes_on.clear()

    async def run() -> list[object]:
        impatient, patient = (asyncio.create_task(asked.problems()) for _ in range(2))
        await asyncio.sleep(0)
        impatient.cancel()
        await asyncio.wait([impatient])
        store.goes_on.set()
        return list(await patient)

    assert asyncio.run(run()) == []


def test_a_silent_store_holds_up_nobody(settings: Settings, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """With more probes at once than the process has threads for requests."""
    monkeypatch.setattr(readiness, "LIMIT_SECONDS", 1.0)
    store.goes_on.clear()
    monkeypatch.setattr("service.store.blobs.BlobStore.check_writable", lambda _: store.check())
    answers: list[int] = []
    with local_client(create_app(settings)) as client:
        probes = [threading.Thread(target=lambda: answers.append(client.get("/readyz").status_code)) for _ in range(45)]
        for probe in probes:
            probe.start()
        assert client.get("/jobs").status_code == 200
        for probe in probes:
            probe.join(60)
    assert answers == [503] * 45
    assert store.num_checks == 1
