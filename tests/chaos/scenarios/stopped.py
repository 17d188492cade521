"""Workers that are told to stop, or that stop for a while without knowing it."""

from __future__ import annotations

import signal

from service.store.models import EventKind
from tests.chaos.lab import Lab
from tests.chaos.scenario import scenario


@scenario("worker-sigterm", "SIGTERM of a worker; the other one has run directories of its own, as on another machine", are_apart=True)
def worker_sigterm(lab: Lab) -> str:
    job_id = lab.train_to_checkpoint()
    holder = lab.holder(job_id)
    holder.process.send_signal(signal.SIGTERM)
    exit_code = holder.process.wait(timeout=30)
    lab.struck(job_id)
    assert exit_code == 0, f"the worker ended with exit code {exit_code}"
    assert lab.finish(job_id).attempt == 2
    steps = [record.step for record in lab.records(job_id)]
    assert steps == list(range(1, len(steps) + 1)), "it saved a checkpoint when it stopped, so no step is trained twice"
    return "no step trained twice"


@scenario("worker-stopped-past-lease", "SIGSTOP of a worker's parent and child until another has the job, then SIGCONT")
def worker_stopped(lab: Lab) -> None:
    job_id = lab.train_to_checkpoint()
    holder = lab.holder(job_id)
    holder.signal(signal.SIGSTOP)
    lab.struck(job_id)
    try:
        lab.wait_for_attempt(job_id, 2)
        lab.wait_for_training(job_id, attempt=2)
    finally:
        holder.signal(signal.SIGCONT)
    assert lab.finish(job_id).attempt == 2
    events = list(lab.client.events(job_id))
    claimed_again = next(index for index, event in enumerate(events) if event.kind is EventKind.CLAIMED and event.attempt == 2)
    assert all(event.attempt == 2 for event in events[claimed_again:]), "what attempt 1 wrote after its lease was refused"
