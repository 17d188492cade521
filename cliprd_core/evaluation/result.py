"""What evaluating one set gives."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class EvaluationResult:
    """One set's metrics; all are fractions 0-1."""

    task: Literal["zero_shot", "retrieval", "validation"]
    dataset: str  # the set's name in the spec
    num_samples: int  # images evaluated; fewer than the set has if some cannot be read
    metrics: dict[str, float]
    chance: dict[str, float]  # what guessing is expected to score, under the same names
