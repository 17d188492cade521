"""What must hold after every fault, checked by looking: at the API, at the processes, at the weights."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

from service.client import CliprdError
from service.schemas import EventView
from service.store.kinds import EventKind
from service.store.states import JobState
from tests.chaos.lab import Lab, Reference
from tests.live import eventually

WEIGHTS = "open_clip_model.safetensors"

Faults = list[str]
"""What is wrong, in words; empty where all is well."""


def check_nothing_lost(lab: Lab) -> Faults:
    """Every job that was acknowledged has succeeded, with every step's measurements, all its files, and every event that was ever told."""
    faults = []
    for job_id in lab.jobs:
        job, events = lab.client.job(job_id), list(lab.client.events(job_id))
        told = lab.witness.told[job_id].events
        if events[: len(told)] != told:
            faults.append(f"events that were told are not there any more: {[event for event in told if event not in events]}")
        if job.state is not JobState.SUCCEEDED or job.result is None:
            faults.append(f"the job is {job.state}")
            continue
        steps = lab.client.metrics(job_id, ["train/loss"])["train/loss"].steps
        missing = sorted(set(range(1, job.result.step + 1)) - set(steps))
        if missing:
            faults.append(f"no measurements of steps {missing}")
        faults += _check_files(lab, job_id)
    return faults


def _check_files(lab: Lab, job_id: str) -> Faults:
    """All files of the model can be downloaded, with the SHA-256 that the store tells."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            lab.client.download_model(job_id, Path(folder))
        except CliprdError as error:
            return [str(error)]
    return []


def check_never_twice(lab: Lab) -> Faults:
    """Each submission made one job, no two runs of a job were ever seen training at once, and the job was claimed once for each attempt,
    after the one before ended."""
    faults = [f"two runs trained at once for {overlap.last_seen - overlap.first_seen:.1f} s" for overlap in lab.watch.overlaps()]
    made = [job.id for job in lab.client.jobs()]
    if sorted(made) != sorted(lab.jobs):
        faults.append(f"{len(lab.jobs)} jobs were submitted, and {len(made)} are there")
    for job_id in lab.jobs:
        faults += check_claims(list(lab.client.events(job_id)))
        attempts = len(lab.watch.cookies.get(job_id, []))
        if attempts > lab.client.job(job_id).attempt:
            faults.append(f"{attempts} runs were started in {lab.client.job(job_id).attempt} attempts")
    return faults


def check_claims(events: list[EventView]) -> Faults:
    """Between two claims the job was queued, and each raises the attempt by one."""
    claims = [event.attempt for event in events if event.kind is EventKind.CLAIMED]
    if claims != list(range(1, len(claims) + 1)):
        return [f"the attempts that were claimed are {claims}"]
    moves = [event.kind for event in events if event.kind in (EventKind.CLAIMED, EventKind.QUEUED)]
    doubled = [first for first, second in pairwise(moves) if first is second is EventKind.CLAIMED]
    return ["it was claimed while it was held"] if doubled else []


def check_no_orphan(lab: Lab) -> Faults:
    """No process is left of any run, nor of a worker that is gone."""

    def look() -> bool | None:
        return not (lab.stack.strays() or [one for one in lab.stack.census() if one.cookie is not None]) or None

    try:
        eventually(look, lab.bench.stray_seconds)
    except AssertionError:
        return [f"process {one.pid} is left: {one.command[:80]}" for one in lab.stack.strays()] or ["a run's processes are left"]
    return []


def check_same_bits(lab: Lab) -> Faults:
    """Weights and losses are those of the undisturbed run, bit for bit."""
    faults = []
    expected = lab.bench.references[lab.num_processes]
    for job_id in lab.jobs:
        made = reference_of(lab, job_id)
        if made.weights_sha256 != expected.weights_sha256:
            faults.append("other weights than those of the undisturbed run")
        different = [step for step, loss in expected.losses.items() if made.losses.get(step) != loss]
        if different:
            faults.append(f"other losses than the undisturbed run's, first at step {different[0]}")
    return faults


def reference_of(lab: Lab, job_id: str) -> Reference:
    """What a job made, by the API."""
    series = lab.client.metrics(job_id, ["train/loss"])["train/loss"]
    (weights,) = [artifact.sha256 for artifact in lab.client.artifacts(job_id) if artifact.name == WEIGHTS]
    return Reference(weights, dict(zip(series.steps, series.values, strict=True)))


INVARIANTS: dict[str, Callable[[Lab], Faults]] = {
    "nothing lost": check_nothing_lost,
    "never twice": check_never_twice,
    "no orphan": check_no_orphan,
    "same bits": check_same_bits,
}
"""By the heading of their column."""
