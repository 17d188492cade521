"""What all parts of the job spec have in common."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class SpecModel(BaseModel):
    """Base of every part of the spec: frozen, and an unknown field is an error, never ignored."""

    model_config = ConfigDict(frozen=True, extra="forbid")
