"""What the pool's children hold, known to their parent: so that one that is killed holds up no job until its lease runs out.

A child notes what it is about to claim before it does, in a pipe that parent and children share. It names the lease by its token, and the
run's processes by their cookie; whatever moment the child is killed in, the parent knows both, and ends no lease but that one.
"""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import NamedTuple

logger = logging.getLogger(__name__)

READ_BYTES = 65_536


class Hold(NamedTuple):
    """What a child holds, or has held; or was about to claim, and found nothing."""

    pid: int
    """The child's."""
    lease_token: str
    cookie: str
    """In the environment of every process of the run."""


class Holds:
    """The pipe, and what the parent has read of it. Children are forked from the process that made it."""

    def __init__(self) -> None:
        self._read_end, self._write_end = os.pipe()
        for end in (self._read_end, self._write_end):
            os.set_blocking(end, False)
        self._rest = b""
        self._newest: dict[int, Hold] = {}
        """By process: a child has one job at a time."""

    def note(self, lease_token: str, cookie: str) -> None:
        """By a child, before it claims. A pipe that is full of unread notes, as of a parent that hangs, costs the note alone: then the
        lease runs out."""
        line = json.dumps(Hold(os.getpid(), lease_token, cookie)) + "\n"
        try:
            os.write(self._write_end, line.encode())  # shorter than PIPE_BUF, so all of it or nothing
        except BlockingIOError:
            logger.warning("the worker's parent process has not read for long; it won't hear of this claim")

    def of_the_dead(self) -> list[Hold]:
        """In the parent: what children held that have ended since. Told again until `forget`."""
        self._read()
        return [hold for hold in self._newest.values() if not _is_child(hold.pid)]

    def forget(self, hold: Hold) -> None:
        """It has been dealt with."""
        if self._newest.get(hold.pid) == hold:
            del self._newest[hold.pid]

    def _read(self) -> None:
        while True:
            try:
                received = os.read(self._read_end, READ_BYTES)
            except BlockingIOError:
                return
            *lines, self._rest = (self._rest + received).split(b"\n")
            for line in lines:
                hold = Hold(*json.loads(line))
                self._newest[hold.pid] = hold

    def close(self) -> None:
        os.close(self._read_end)
        os.close(self._write_end)


def _is_child(pid: int) -> bool:
    """Whether a live process has this id and is ours: our child, or we, as in a pool without children."""
    if pid == os.getpid():
        return True
    try:
        state, parent = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[:2]
    except OSError:
        return False
    return int(parent) == os.getpid() and state not in "ZX"
