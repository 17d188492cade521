"""Work in rounds beside the jobs: it goes on after a failure, ends when told to, and no fork falls into the middle of it."""

from __future__ import annotations

import logging
import os
import threading

import pytest

from worker.rounds import Rounds


def test_a_failing_round_is_logged_and_the_next_one_comes_until_the_end(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("worker.rounds.STOP_SECONDS", 60.0)
    num_rounds = 0
    enough = threading.Event()

    def work() -> None:
        nonlocal num_rounds
        num_rounds += 1
        if num_rounds == 1:
            raise ConnectionError("store away")
        enough.set()

    rounds = Rounds("tester", work, pause_seconds=0.01)
    with caplog.at_level(logging.ERROR):
        rounds.start()
        assert enough.wait(60)
        rounds.stop()
    assert "tester: the round failed" in caplog.text
    assert "store away" in caplog.text
    assert not [thread for thread in threading.enumerate() if thread.name == "tester"]


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_fork_waits_for_the_end_of_a_round_and_its_child_can_do_rounds() -> None:
    is_inside, may_end = threading.Event(), threading.Event()
    ended: list[bool] = []

    def work() -> None:
        is_inside.set()
        may_end.wait(120)
        ended.append(True)

    rounds = Rounds("tester", work, pause_seconds=0.01)
    rounds.start()
    assert is_inside.wait(60)
    threading.Timer(0.1, may_end.set).start()
    child = os.fork()
    if child == 0:
        os._exit(0 if ended and rounds.lock.acquire(timeout=60) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    rounds.stop()
