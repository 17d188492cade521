"""Watches all jobs' training processes, several times a second: whose they are, and whether two attempts at one job train at once."""

from __future__ import annotations

import contextlib
import re
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from worker.run_cookie import COOKIE_VARIABLE

MARK_VARIABLE = "CLIPRD_CHAOS_MARK"
"""In the environment of everything that a stack starts, and so in that of all that this starts in turn."""
PAUSE_SECONDS = 0.05
STABLE_SECONDS = 5.0
"""A process this old has done its last exec, so that its environment stays."""
_RUN = re.compile(r"/([0-9a-z-]{8,64})/spec\.json")


@dataclass(frozen=True)
class Marked:
    """A live process of a stack."""

    pid: int
    parent: int
    state: str
    """One letter, as in /proc/PID/stat: `T` is stopped."""
    cookie: str | None
    """Of the run it belongs to."""
    is_rank: bool
    """It trains, or loads data for one that does; torchrun itself does not."""
    job_id: str | None
    command: str

    @property
    def trains(self) -> bool:
        """It makes progress just now."""
        return self.is_rank and self.cookie is not None and self.state != "T"


@dataclass(frozen=True)
class Overlap:
    """Two runs of one job, seen to train at the same time."""

    job_id: str
    first_seen: float
    last_seen: float
    """Both of the monotonic clock."""


class Census:
    """Finds the processes that carry a mark."""

    def __init__(self, mark: str) -> None:
        self._mark = f"{MARK_VARIABLE}={mark}".encode()
        self._first_seen: dict[int, float] = {}
        self._strangers: set[int] = set()

    def take(self) -> list[Marked]:
        """All live ones. What is surely not ours is looked at once."""
        now = time.monotonic()
        pids = {int(folder.name) for folder in Path("/proc").iterdir() if folder.name.isdigit()}
        self._strangers &= pids
        self._first_seen = {pid: self._first_seen.get(pid, now) for pid in pids}
        found = []
        for pid in pids - self._strangers:
            with contextlib.suppress(OSError):  # ended meanwhile
                marked = self._look(pid)
                if marked is not None:
                    found.append(marked)
                elif now - self._first_seen[pid] > STABLE_SECONDS:
                    self._strangers.add(pid)
        return found

    def _look(self, pid: int) -> Marked | None:
        folder = Path(f"/proc/{pid}")
        environment = (folder / "environ").read_bytes().split(b"\0")
        if self._mark not in environment:
            return None
        values = dict(entry.decode(errors="replace").partition("=")[::2] for entry in environment)
        state, parent = (folder / "stat").read_text().rpartition(")")[2].split()[:2]
        if state in "ZX":
            return None
        command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        run = _RUN.search(command)
        return Marked(
            pid=pid,
            parent=int(parent),
            state=state,
            cookie=values.get(COOKIE_VARIABLE),
            is_rank="RANK" in values,
            job_id=None if run is None else run[1],
            command=command.strip(),
        )


class TrainerWatch:
    """Context manager: takes a census all the time, in a thread."""

    def __init__(self, mark: str) -> None:
        self._census = Census(mark)
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._work, name="trainer-watch", daemon=True)
        self._jobs: dict[str, str] = {}  # by cookie
        self._overlaps: dict[str, Overlap] = {}
        self.num_samples = 0
        self.cookies: dict[str, list[str]] = {}
        """Of each job, in order of their first sight: one for every run that was started."""

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._done.set()
        self._thread.join()

    def overlaps(self) -> list[Overlap]:
        return list(self._overlaps.values())

    def _work(self) -> None:
        while not self._done.wait(PAUSE_SECONDS):
            self._sample()

    def _sample(self) -> None:
        self.num_samples += 1
        processes = self._census.take()
        for process in processes:
            if process.cookie is not None and process.job_id is not None and process.cookie not in self._jobs:
                self._jobs[process.cookie] = process.job_id
                self.cookies.setdefault(process.job_id, []).append(process.cookie)
        training: dict[str, dict[str, Marked]] = {}
        for process in processes:
            if process.trains and process.cookie in self._jobs:
                assert process.cookie is not None
                training.setdefault(self._jobs[process.cookie], {})[process.cookie] = process
        for job_id, by_cookie in training.items():
            if len(by_cookie) > 1 and all(_still_trains(process) for process in by_cookie.values()):
                now = time.monotonic()
                first = self._overlaps[job_id].first_seen if job_id in self._overlaps else now
                self._overlaps[job_id] = Overlap(job_id, first, now)


def _still_trains(process: Marked) -> bool:
    """A census takes some milliseconds, in which one run may have ended and the next begun."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0] not in "TZX"
    return False
