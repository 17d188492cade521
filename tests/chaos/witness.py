"""A client that looks at jobs all the time and remembers every answer: what was told must stay true."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field
from types import TracebackType
from typing import NamedTuple, Self

from service.client import Client, CliprdError
from service.schemas import EventView, JobView
from service.store.states import JobState
from tests.live import eventually

PAUSE_SECONDS = 0.1


class Sight(NamedTuple):
    """What the API told of a job at some time of the monotonic clock."""

    at: float
    state: JobState
    attempt: int
    step: int


@dataclass
class Told:
    """Of one job, everything."""

    sights: list[Sight] = field(default_factory=list)
    events: list[EventView] = field(default_factory=list)

    @property
    def step(self) -> int:
        """The highest step told so far."""
        return max((sight.step for sight in self.sights), default=0)

    def first_beyond(self, step: int, after: float) -> float | None:
        """When a step beyond this one, or success, was first told after that time."""
        beyond = (one.at for one in self.sights if one.at > after and (one.step > step or one.state is JobState.SUCCEEDED))
        return next(beyond, None)


class Witness:
    """Context manager: looks in a thread. While the API does not answer, it tries on."""

    def __init__(self, url: str) -> None:
        self._client = Client(url, api_key="")
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._work, name="witness", daemon=True)
        self.told: dict[str, Told] = {}
        self.num_refusals = 0
        """Looks that were not answered."""

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._done.set()
        self._thread.join()
        self._client.close()

    def follow(self, job_id: str) -> Told:
        return self.told.setdefault(job_id, Told())

    def wait_for_end(self, job_id: str) -> None:
        """Until the job was seen to have finished, with all its events."""
        sights = self.told[job_id].sights
        eventually(lambda: (bool(sights) and sights[-1].state.is_finished) or None)

    def _work(self) -> None:
        while not self._done.wait(PAUSE_SECONDS):
            for job_id, told in list(self.told.items()):
                if not (told.sights and told.sights[-1].state.is_finished):
                    self._look(job_id, told)

    def _look(self, job_id: str, told: Told) -> None:
        try:
            job = self._client.job(job_id)
            news = list(self._client.events(job_id, after=told.events[-1].id if told.events else 0))
        except CliprdError:
            self.num_refusals += 1
            return
        told.events += news
        told.sights.append(sight_of(job))


def sight_of(job: JobView) -> Sight:
    return Sight(time.monotonic(), job.state, job.attempt, 0 if job.progress is None else job.progress.step)
