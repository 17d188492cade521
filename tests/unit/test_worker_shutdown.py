"""The shutdown flag reaches processes forked before and after it is raised."""

import os
import time
from collections.abc import Iterator

import pytest

from worker.shutdown import ShutdownFlag


@pytest.fixture
def flag() -> Iterator[ShutdownFlag]:
    flag = ShutdownFlag()
    yield flag
    flag.close()


def fork_and_wait_for(flag: ShutdownFlag) -> int:
    child = os.fork()
    if child == 0:
        deadline = time.monotonic() + 60
        while not flag.is_raised() and time.monotonic() < deadline:
            time.sleep(0.005)
        os._exit(0 if flag.is_raised() else 1)
    return child


def exit_code(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_every_process_sees_it_and_it_stays(flag: ShutdownFlag) -> None:
    before = fork_and_wait_for(flag)
    assert not flag.is_raised()
    flag.raise_()
    after = fork_and_wait_for(flag)
    assert exit_code(before) == 0
    assert exit_code(after) == 0
    assert flag.is_raised()


def test_raising_it_again_and_again_never_blocks(flag: ShutdownFlag) -> None:
    for _ in range(70_000):  # more than a pipe holds
        flag.raise_()
    assert flag.is_raised()
