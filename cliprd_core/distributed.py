"""The process group: starting and ending it, who am I, and the few collectives that training needs.

Every function also works without a process group, where there is one process of rank 0. Nothing here knows losses or models.
"""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

_VARIABLES = ("RANK", "MASTER_ADDR", "MASTER_PORT")


def init(device: torch.device) -> None:
    """Join the process group that the launcher describes in the environment, as torchrun does; alone, do nothing.

    `cliprd_core.launcher` has put SLURM's variables there under these names.

    Reads WORLD_SIZE, RANK, MASTER_ADDR and MASTER_PORT. The backend is NCCL on CUDA and Gloo elsewhere.

    Args:
        device: where this process computes. On CUDA its index is this process's own GPU (LOCAL_RANK's).

    Raises:
        ValueError: WORLD_SIZE asks for several processes and another variable is missing.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return
    missing = [name for name in _VARIABLES if name not in os.environ]
    if missing:
        raise ValueError(f"WORLD_SIZE is {os.environ['WORLD_SIZE']} but {', '.join(missing)} is not set; start with torchrun or srun")
    if device.type == "cuda":
        torch.cuda.set_device(device)
        dist.init_process_group("nccl", device_id=device)
    else:
        dist.init_process_group("gloo")


def shutdown() -> None:
    """Leave the process group, if there is one."""
    if _is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    """This process's number, 0 for the main one."""
    return dist.get_rank() if _is_initialized() else 0


def world_size() -> int:
    """Number of processes."""
    return dist.get_world_size() if _is_initialized() else 1


def is_main() -> bool:
    """Whether this process is the one that logs and saves."""
    return rank() == 0


def all_reduce_sum(x: Tensor) -> Tensor:
    """Sum of `x` over ranks, the same on each; any shape, equal on all ranks. Detached; `x` itself is left alone."""
    return _all_reduced(x, dist.ReduceOp.SUM)


def all_reduce_exp_sum(largest: Tensor, total: Tensor) -> tuple[Tensor, Tensor]:
    """Σ_ranks exp(largest) · total, elementwise and without overflow, in the same form; any shape, equal on all ranks.

    Args:
        largest: this rank's largest exponent, -inf where its sum is empty.
        total: this rank's sum of exponentials over exp(largest), 0 where it is empty.

    Returns:
        The largest exponent of all ranks, and the sum of all over its exponential. Detached.
    """
    if world_size() == 1:
        return largest.detach(), total.detach()
    largest_of_all = _all_reduced(largest, dist.ReduceOp.MAX)
    # Where every rank's sum is empty, -inf − -inf would be NaN.
    shifted = (largest.detach() - largest_of_all).masked_fill(largest_of_all == -torch.inf, -torch.inf)
    return largest_of_all, all_reduce_sum(shifted.exp() * total)


@torch.no_grad()
def broadcast_buffers(module: nn.Module) -> None:
    """Give every rank the main one's buffers: each has normalised, and kept statistics of, its own share of the batches."""
    if world_size() > 1:
        for buffer in module.buffers():
            dist.broadcast(buffer, src=0)


def gather_row_counts(num_rows: int) -> list[int]:
    """Every rank's `num_rows`, by rank."""
    if world_size() == 1:
        return [num_rows]
    counts = torch.zeros(world_size(), dtype=torch.int64, device=_collective_device())
    counts[rank()] = num_rows
    return [int(count) for count in all_reduce_sum(counts).tolist()]


def gather_with_grad(x: Tensor, row_counts: list[int] | None = None) -> Tensor:
    """Concatenate every rank's rows, in rank order; the gradient flows back to the rank that owns each row.

    Backward sums the gradients of all ranks and returns this rank's own rows, so it must run on every rank. With one process
    the result is `x` itself.

    Args:
        x: (b, D); b may differ between ranks, D may not.
        row_counts: every rank's b, if the caller knows them (:func:`gather_row_counts`); saves asking the other ranks.

    Returns:
        (B, D), B the sum of all b.
    """
    if world_size() == 1:
        return x
    counts = gather_row_counts(len(x)) if row_counts is None else row_counts
    assert counts[rank()] == len(x), "row_counts do not belong to x"
    gathered: Tensor = _GatherRows.apply(x, counts)
    return gathered


class _GatherRows(torch.autograd.Function):
    """(b, D) on each rank to (B, D) on all; backward sums over ranks."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, row_counts: list[int]) -> Tensor:
        ctx.row_counts = row_counts
        largest = max(row_counts)
        padded = x.contiguous()
        if len(x) < largest:  # backends want equal shapes
            padded = x.new_zeros(largest, *x.shape[1:])
            padded[: len(x)] = x
        gathered = x.new_empty(len(row_counts), largest, *x.shape[1:])
        dist.all_gather(list(gathered), padded)
        if min(row_counts) == largest:
            return gathered.flatten(0, 1)
        return torch.cat([part[:count] for part, count in zip(gathered, row_counts, strict=True)])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        start = sum(ctx.row_counts[: rank()])
        # A copy, so that the (B, D) sum does not outlive this function.
        return all_reduce_sum(grad)[start : start + ctx.row_counts[rank()]].clone(), None


def _is_initialized() -> bool:
    return dist.is_available() and dist.is_initialized()


def _collective_device() -> torch.device:
    """Where tensors must lie for the backend to take them."""
    is_nccl = _is_initialized() and dist.get_backend() == "nccl"
    return torch.device("cuda", torch.cuda.current_device()) if is_nccl else torch.device("cpu")


def _all_reduced(x: Tensor, operation: Any) -> Tensor:
    reduced = x.detach().clone(memory_format=torch.contiguous_format)
    if world_size() > 1:
        dist.all_reduce(reduced, op=operation)
    return reduced
