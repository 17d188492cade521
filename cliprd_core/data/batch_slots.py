"""How a batch gets from a loader process to the trainer: through memory that both have shared since the fork.

torch's own way makes a shared-memory file for each tensor of each batch and passes its descriptor through a socket with a handshake.
That costs time per tensor, a file's worth of fresh pages per batch, and a large /dev/shm, which containers do not have.
"""

from __future__ import annotations

import io
import itertools
import mmap
import pickle
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from cliprd_core.data.batch_builder import BuiltBatch

MIN_SHARED_BYTES = 4096
"""Smaller arrays travel beside, in the pickled message."""
ALIGNMENT = 64
PADDING = 64 * ALIGNMENT  # what aligning the arrays of one batch may cost


class BatchSlots:
    """Places for batches in shared memory; make it before the loader processes are forked.

    A slot is written by the loader process that builds a batch and read once by the trainer. Whoever hands out the work sees to it
    that a slot is not given out again before its batch was unpacked. Memory that was never written takes none.

    Args:
        num_slots: Batches that may be on their way at once.
        bytes_per_slot: What the arrays of a batch need; those beyond it go into the message, which is slower and nothing worse.
    """

    _by_number: ClassVar[weakref.WeakValueDictionary[int, BatchSlots]] = weakref.WeakValueDictionary()
    _numbers = itertools.count()

    def __init__(self, num_slots: int, bytes_per_slot: int) -> None:
        self.num_slots = num_slots
        self._bytes_per_slot = -(-(bytes_per_slot + PADDING) // mmap.PAGESIZE) * mmap.PAGESIZE
        self._memory = np.frombuffer(mmap.mmap(-1, num_slots * self._bytes_per_slot), dtype=np.uint8)
        self._number = next(self._numbers)
        self._by_number[self._number] = self

    def pack(self, built: BuiltBatch, slot: int) -> PackedBatch:
        """Put the arrays of `built` into the slot; what is returned is small, and pickles."""
        memory = self._slot(slot)
        spans: list[tuple[int, int]] = []
        end = 0

        def keep_in_message(buffer: pickle.PickleBuffer) -> bool:
            nonlocal end
            content = np.frombuffer(buffer.raw(), dtype=np.uint8)
            if len(content) < MIN_SHARED_BYTES or end + len(content) > len(memory):
                return True
            memory[end : end + len(content)] = content
            spans.append((end, len(content)))
            end += -(-len(content) // ALIGNMENT) * ALIGNMENT
            return False

        message = io.BytesIO()
        _Pickler(message, keep_in_message).dump(built)
        return PackedBatch(self._number, slot, message.getvalue(), tuple(spans))

    @classmethod
    def unpack(cls, packed: PackedBatch) -> BuiltBatch:
        """The batch, in memory of its own, so that the slot is free for the next."""
        memory = torch.from_numpy(cls._by_number[packed.slots]._slot(packed.slot))
        # By torch, which lets other threads of the trainer run meanwhile.
        copies = [memory[start : start + size].clone().numpy() for start, size in packed.spans]
        built = pickle.loads(packed.message, buffers=copies)  # noqa: S301  (of our own child)
        assert isinstance(built, BuiltBatch)
        return built

    def _slot(self, slot: int) -> Any:
        return self._memory[slot * self._bytes_per_slot : (slot + 1) * self._bytes_per_slot]


@dataclass(frozen=True)
class PackedBatch:
    """A batch on its way. Its large arrays are in a slot."""

    slots: int
    slot: int
    message: bytes
    spans: tuple[tuple[int, int], ...]  # start and length in the slot, bytes

    def pin_memory(self) -> BuiltBatch:
        """Called by torch's DataLoader, in a thread of the trainer, where the copy to a GPU is to overlap with computing."""
        return BatchSlots.unpack(self).pin_memory()


class _Pickler(pickle.Pickler):
    """Tensors go as NumPy arrays, whose memory the pickle protocol lets travel by itself (PEP 574)."""

    def __init__(self, file: io.BytesIO, keep_in_message: Callable[[pickle.PickleBuffer], bool]) -> None:
        super().__init__(file, protocol=5, buffer_callback=keep_in_message)

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, Tensor):
            return torch.from_numpy, (obj.numpy(),)
        return NotImplemented
