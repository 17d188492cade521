"""Kinds of what jobs leave: events and artifacts. Both are stored by their values."""

from __future__ import annotations

from enum import StrEnum


class EventKind(StrEnum):
    """What can happen to a job."""

    CREATED = "created"
    WAITING = "waiting"
    """A teacher of it is a job that has not finished."""
    QUEUED = "queued"
    CLAIMED = "claimed"
    """A worker took it: a new attempt."""
    STARTED = "started"
    """The attempt's training process runs."""
    CHECKPOINT = "checkpoint"
    """A checkpoint is in the artifact store."""
    EVALUATED = "evaluated"
    LEASE_LOST = "lease_lost"
    """The worker vanished: its lease ran out. (Versions before 2026-11-28 told a killed training process so, too.)"""
    ATTEMPT_LOST = "attempt_lost"
    """The attempt failed for a reason that may pass, such as a killed training process; it counts towards `max_attempts`."""
    PAUSING = "pausing"
    """Its worker was asked to pause it."""
    PAUSED = "paused"
    RESUMED = "resumed"
    RETRIED = "retried"
    CANCEL_REQUESTED = "cancel_requested"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"


class ArtifactKind(StrEnum):
    """What an artifact is for."""

    MODEL = "model"
    """One file of the exported student."""
    CHECKPOINT = "checkpoint"
    """One file of a checkpoint, mirrored so that the job can resume on another machine."""
    BEST_CHECKPOINT = "best_checkpoint"
    """One file of the checkpoint that an evaluation found best (`training.keep_checkpoints.best`); it stays as long as the job."""
