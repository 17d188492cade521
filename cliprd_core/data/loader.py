"""The training loader: batches in an order that is known beforehand, prepared by processes that run ahead."""

from __future__ import annotations

import atexit
import itertools
import logging
import os
import signal
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from cliprd_core.data.batch import Batch, FeatureReader, ModelInput
from cliprd_core.data.batch_builder import BatchBuilder, BuiltBatch
from cliprd_core.data.batch_slots import BatchSlots, PackedBatch
from cliprd_core.data.errors import InvalidDataError
from cliprd_core.data.loader_process import ChildInit, stop_signals_held
from cliprd_core.data.plan import BatchRequest, Plan
from cliprd_core.data.sources import PairSource
from cliprd_core.spec import Device, JobSpec

log = logging.getLogger(__name__)

PREFETCH_FACTOR = 2
"""Batches that each loader process is ahead."""

Position = tuple[int, int]
"""(epoch, step within it)"""


def build_train_loader(
    spec: JobSpec,
    source: PairSource,
    *,
    student: ModelInput,
    teachers: Sequence[ModelInput] = (),
    readers: Sequence[FeatureReader | None] = (),
    rank: int = 0,
    world_size: int = 1,
) -> TrainLoader:
    """The loader of one training process.

    Args:
        spec: its `training`, `data.crop_scale` and, with teachers, `data.teacher_views` are used.
        source: the training pairs, as `open_sources` gives them.
        teachers: how the teachers want their inputs.
        readers: where each teacher's features may be stored; empty, or one (or None) per teacher.

    Raises:
        InvalidDataError: there are fewer pairs than one global batch.
        ValueError: the global batch cannot be shared evenly by `world_size` processes.
    """
    training = spec.training
    return TrainLoader(
        BatchBuilder(
            source,
            student=student,
            teachers=teachers,
            crop_scale=spec.data.crop_scale,
            seed=training.seed,
            num_views=spec.data.teacher_views if teachers else 0,
            readers=readers,
        ),
        Plan(len(source), training.global_batch_size, training.seed, rank, world_size),
        num_data_workers=training.num_data_workers,
        pin_memory=spec.resources.device is not Device.CPU and torch.cuda.is_available(),
    )


class TrainLoader:
    """Yields one process's batches, epoch by epoch.

    The loader processes run on into the next epoch while the trainer evaluates or saves, so an epoch's start costs nothing. They
    are started at the first use, and stop with `close()` or with the process.
    """

    def __init__(self, builder: BatchBuilder, plan: Plan, *, num_data_workers: int, pin_memory: bool = False) -> None:
        self._plan = plan
        # One batch more than are on their way: the next is asked for before the one that came is unpacked.
        slots = BatchSlots(PREFETCH_FACTOR * num_data_workers + 1, plan.batch_size * builder.bytes_per_pair) if num_data_workers else None
        self._requests = _Requests(plan, slots.num_slots if slots else 1)
        self._corrupt: set[int] = set()
        self._next: Position | None = None  # where the running stream stands
        self._stream: Iterator[PackedBatch | BuiltBatch | InvalidDataError] | None = None
        self._loader: DataLoader[Any] | None = DataLoader(
            _Steps(builder, slots),
            batch_size=None,  # a request is a batch already
            sampler=self._requests,
            num_workers=num_data_workers,
            prefetch_factor=PREFETCH_FACTOR if num_data_workers else None,
            collate_fn=_unchanged,
            pin_memory=pin_memory,
            worker_init_fn=ChildInit(os.getpid()),
            # Forked, a loader process is there at once and shares the index and the tokenizer.
            multiprocessing_context="fork" if num_data_workers else None,
            persistent_workers=num_data_workers > 0,
            generator=torch.Generator(),  # of its own, or every start would advance torch's global one
        )

    @property
    def num_samples(self) -> int:
        """Pairs in the data, readable or not."""
        return self._plan.num_samples

    @property
    def num_steps_per_epoch(self) -> int:
        return self._plan.num_steps_per_epoch

    @property
    def corrupt_indices(self) -> frozenset[int]:
        """Numbers of the pairs met so far, by this process, that could not be read."""
        return frozenset(self._corrupt)

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[Batch]:
        """The batches of epoch `epoch` from step `start_step` on, both from 0. One iteration at a time.

        Raises:
            InvalidDataError: on reaching a step most of whose pairs cannot be read.
        """
        if not 0 <= start_step <= self.num_steps_per_epoch:
            raise ValueError(f"epoch {epoch} has steps 0 to {self.num_steps_per_epoch - 1}; it cannot start at {start_step}")
        return self._batches(epoch, start_step)

    def close(self) -> None:
        """Stop the loader processes. The loader cannot be used afterwards; closing twice is harmless."""
        atexit.unregister(self.close)
        # Not left to the stream's destructor: an exception's traceback may keep it alive until the interpreter ends, which then
        # waits for ever for processes that are deaf to SIGTERM.
        shut_down = getattr(self._stream, "_shutdown_workers", None)  # there is none without loader processes
        if shut_down is not None:
            shut_down()
        self._stream = self._loader = self._next = None

    def _batches(self, epoch: int, start_step: int) -> Iterator[Batch]:
        for step in range(start_step, self.num_steps_per_epoch):
            built = self._built((epoch, step))
            for index, reason in built.corrupt.items():
                if index not in self._corrupt:
                    self._corrupt.add(index)
                    log.warning("training pair %d cannot be read; the next readable one takes its place. %s", index, reason)
            yield built.batch

    def _built(self, position: Position) -> BuiltBatch:
        if self._stream is None or self._next != position:
            self._start_stream(position)
        assert self._stream is not None
        self._next = None  # until the batch is here: after an error the stream's place is unknown
        try:
            built = next(self._stream)
        except RuntimeError as error:
            self._tell_of_a_killed_process(error)
            raise
        if isinstance(built, InvalidDataError):
            raise built
        if isinstance(built, PackedBatch):  # not where torch's pinning thread has opened it
            built = BatchSlots.unpack(built)
        self._next = self._requests.after(position)
        return built

    def _tell_of_a_killed_process(self, error: RuntimeError) -> None:
        """torch raises its word for a loader process that SIGKILL ended from its handler of SIGCHLD. If what that interrupts bears any
        exception, as logging does, it says seconds later only that a process has exited.

        Raises:
            RuntimeError: SIGKILL ended one, in torch's words.
        """
        for process in getattr(self._stream, "_workers", ()):
            if process.exitcode == -signal.SIGKILL:
                message = f"DataLoader worker (pid {process.pid}) is killed by signal: {signal.strsignal(signal.SIGKILL)}."
                raise RuntimeError(message) from error

    def _start_stream(self, position: Position) -> None:
        assert self._loader is not None, "the loader is closed"
        self._requests.start = position
        with stop_signals_held(), warnings.catch_warnings():
            # Python 3.12 warns of forking beside threads. The children run Python, numpy and single-threaded torch on the CPU only,
            # none of which holds a lock of the parent's threads (process group, CUDA).
            warnings.filterwarnings("ignore", message=r".*multi-threaded, use of fork\(\)", category=DeprecationWarning)
            self._stream = iter(self._loader)
        atexit.register(self.close)


class _Requests(Sampler[tuple[int, BatchRequest]]):
    """Every step from `start` on, epoch after epoch, without end, and the slot for its batch: all in turn."""

    def __init__(self, plan: Plan, num_slots: int) -> None:
        self._plan = plan
        self._num_slots = num_slots
        self.start: Position = (0, 0)

    def __iter__(self) -> Iterator[tuple[int, BatchRequest]]:
        position = self.start
        for number in itertools.count():
            yield number % self._num_slots, self._plan.request(*position)
            position = self.after(position)

    def after(self, position: Position) -> Position:
        epoch, step = position
        return (epoch, step + 1) if step + 1 < self._plan.num_steps_per_epoch else (epoch + 1, 0)


class _Steps(Dataset[PackedBatch | BuiltBatch | InvalidDataError]):
    """What the loader processes hold. Without slots it is the trainer's own process that builds."""

    def __init__(self, builder: BatchBuilder, slots: BatchSlots | None) -> None:
        self._builder = builder
        self._slots = slots

    def __getitem__(self, request: tuple[int, BatchRequest]) -> PackedBatch | BuiltBatch | InvalidDataError:
        slot, step = request
        try:
            built = self._builder.build(step)
        except InvalidDataError as error:
            return error  # raised by the trainer's side; DataLoader would wrap the message in a traceback
        return built if self._slots is None else self._slots.pack(built, slot)


def _unchanged(built: Any) -> Any:
    return built
