"""Agreement between the training processes about what to do next, apart from the tensors they exchange.

A process group of its own, on the CPU: asking it never makes a GPU wait, and it tolerates the main process being away for hours
in an evaluation, which the group for gradients must not.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from cliprd_core import distributed

T = TypeVar("T")

LONGEST_ABSENCE = timedelta(days=1)
"""How long the other processes wait for the main one. One that died is noticed at once, by its closed connection, and a machine that
vanished by its silence (`connections.py`)."""


class ControlGroup:
    """Collective decisions; every rank must call each method at the same points. Alone, each is free."""

    def __init__(self) -> None:
        self._group: Any = dist.new_group(backend="gloo", timeout=LONGEST_ABSENCE) if distributed.world_size() > 1 else None

    def any(self, flag: bool) -> bool:
        """Whether `flag` is true on at least one rank; the same answer on all."""
        if self._group is None:
            return flag
        votes = torch.tensor(int(flag))
        dist.all_reduce(votes, op=dist.ReduceOp.MAX, group=self._group)
        return bool(votes.item())

    def gather(self, own: T) -> list[T] | None:
        """Every rank's `own`, by rank, on the main rank; None elsewhere. Pickled, so not for what others may have made."""
        if self._group is None:
            return [own]
        gathered: list[Any] | None = [None] * distributed.world_size() if distributed.is_main() else None
        dist.gather_object(own, gathered, dst=0, group=self._group)
        return gathered

    def broadcast(self, obj: T) -> T:
        """The main rank's `obj`, on every rank."""
        if self._group is None:
            return obj
        box: list[Any] = [obj]
        dist.broadcast_object_list(box, src=0, group=self._group)
        received: T = box[0]
        return received

    def union(self, numbers: frozenset[int]) -> frozenset[int]:
        """All ranks' `numbers` together."""
        if self._group is None:
            return numbers
        gathered: list[frozenset[int]] = [frozenset()] * distributed.world_size()
        dist.all_gather_object(gathered, numbers, group=self._group)
        return frozenset().union(*gathered)

    def wait(self) -> None:
        """Return once every rank has come here."""
        self.any(False)
