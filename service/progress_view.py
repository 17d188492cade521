"""Shows jobs' progress while they run: live bars on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from service.schemas import JobView
from service.store.states import JobState

PLAIN_LINE_EVERY_SECONDS = 5.0


class ProgressView:
    """Context manager; call `show` with each fresh look at a job. Several jobs have a bar each."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bars = Progress(
            TextColumn("{task.description}", style="bold"),
            BarColumn(bar_width=24),
            TextColumn("{task.percentage:>3.0f} %"),
            TextColumn("{task.fields[status]}"),
            console=console,
        )
        self._tasks: dict[str, TaskID] = {}
        self._said: dict[str, tuple[str, float]] = {}  # last line of each job, and when (monotonic seconds)
        self._said_state: dict[str, JobState] = {}

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._bars.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._console.is_terminal:
            self._bars.stop()

    def show(self, job: JobView) -> None:
        if self._console.is_terminal:
            self._show_bar(job)
        else:
            self._say_line(job)

    def _show_bar(self, job: JobView) -> None:
        if job.id not in self._tasks:
            self._tasks[job.id] = self._bars.add_task(job.name, total=None, status="")
        step, num_steps = (0, None) if job.progress is None else (job.progress.step, job.progress.num_steps)
        self._bars.update(self._tasks[job.id], completed=step, total=num_steps, status=status_of(job))

    def _say_line(self, job: JobView) -> None:
        """A line when the job's state changes; and, while it runs, now and then when there is something new to say."""
        now = time.monotonic()
        share = "" if job.progress is None else f"{job.progress.step / job.progress.num_steps:4.0%}  "
        line = f"{job.name}  {share}{status_of(job)}"
        said, said_at = self._said.get(job.id, ("", -PLAIN_LINE_EVERY_SECONDS))
        is_new_state = self._said_state.get(job.id) is not job.state
        if is_new_state or (line != said and now - said_at >= PLAIN_LINE_EVERY_SECONDS):
            self._said[job.id] = (line, now)
            self._said_state[job.id] = job.state
            self._console.print(line, highlight=False, markup=False, soft_wrap=True)


def status_of(job: JobView) -> str:
    """One line: what the job does, and how it fares."""
    if job.state is not JobState.RUNNING:
        if job.waiting_for is not None:
            return f"{job.state}: {job.waiting_for}"
        return "waits for its teacher" if job.state is JobState.WAITING else str(job.state)
    if job.cancel_requested_at is not None:
        return "stopping"
    if job.pause_requested_at is not None:
        return "pausing"
    if job.progress is None:
        return "starting"
    parts: list[str] = [f"step {job.progress.step}/{job.progress.num_steps}"]
    if "train/loss" in job.metrics:
        parts.append(f"loss {job.metrics['train/loss']:.3f}")
    parts.append(f"{job.progress.samples_per_second:,.0f} samples/s")
    if job.progress.step == job.progress.num_steps:
        parts.append("evaluating and exporting")
    elif job.progress.eta_seconds is not None:
        parts.append(f"{duration(job.progress.eta_seconds)} left")
    return "  ".join(parts)


def duration(seconds: float) -> str:
    """`8 s`, `3:05`, `2:03:05`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
