"""Several training processes in a process group, for tests of what they do together."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Sequence
from typing import Any

import torch
import torch.multiprocessing as mp

from cliprd_core import distributed
from tests.ports import free_port


def set_group_environment(rank: int, num_processes: int, port: int) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(num_processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


def join_group(rank: int, num_processes: int, port: int) -> None:
    set_group_environment(rank, num_processes, port)
    distributed.init(torch.device("cpu"))


def run_processes(check: Any, num_processes: int, *arguments: Any, imports: Sequence[str] = ("cliprd_core.objective",)) -> None:
    """`check(rank, num_processes, port, *arguments)` in each process, which has `imports` already: they take longer than the checks."""
    multiprocessing.set_forkserver_preload(["torch", *imports])
    mp.start_processes(check, args=(num_processes, free_port(), *arguments), nprocs=num_processes, start_method="forkserver")
