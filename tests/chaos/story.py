"""What happened to a job, in one line, from its events and from what its trainers wrote down."""

from __future__ import annotations

from service.schemas import EventView
from service.store.kinds import EventKind
from tests.chaos.lab import Lab

ENDS = {
    EventKind.LEASE_LOST: "lost",
    EventKind.ATTEMPT_LOST: "lost",
    EventKind.QUEUED: "queued again",
    EventKind.PAUSED: "paused",
    EventKind.SUCCEEDED: "succeeded",
    EventKind.FAILED: "failed",
    EventKind.CANCELLED: "cancelled",
}


def story_of(lab: Lab, job_id: str) -> str:
    """As `attempt 1 lost; 2 from step 41 succeeded`."""
    events = list(lab.client.events(job_id))
    first_steps: dict[int, int] = {}
    for record in lab.records(job_id):
        first_steps.setdefault(record.attempt, record.step)
    parts = []
    for attempt in range(1, lab.client.job(job_id).attempt + 1):
        step = first_steps.get(attempt)
        start = "without a step" if step is None else f"from step {step}" if step > 1 else ""
        parts.append(" ".join(part for part in (f"{attempt}", start, end_of(events, attempt)) if part))
    return f"attempt {'; '.join(parts)}"


def end_of(events: list[EventView], attempt: int) -> str:
    """How an attempt ended."""
    own = [event for event in events if event.attempt == attempt]
    claimed_at = next(index for index, event in enumerate(own) if event.kind is EventKind.CLAIMED)
    ends = [event for event in own[claimed_at:] if event.kind in ENDS]
    if not ends:
        return "runs"
    reason = ends[0].data.get("reason")
    return ENDS[ends[0].kind] + (f" ({reason})" if reason else "")
