"""What all parts of the job spec have in common."""

from __future__ import annotations

from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, StrictFloat

Fraction = Annotated[StrictFloat, Field(gt=0.0, le=1.0)]
Path = Annotated[str, Field(min_length=1, max_length=4096)]

MAX_LIST_LENGTH = 256
MAX_COUNT = 10**12
"""Of pairs and steps: more than anyone has, and exact in any program that reads the spec."""


class SpecModel(BaseModel):
    """Base of every part of the spec: frozen, an unknown field is an error, never ignored, and a number is finite, as JSON has no other."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    def __deepcopy__(self, memo: dict[int, Any] | None = None) -> Self:
        """Itself, as nothing changes it: pydantic copies a default for every spec that leaves it out."""
        return self
