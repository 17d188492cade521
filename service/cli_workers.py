"""The command about workers."""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer

from service.cli_common import DEFAULT_URL, Url, connected, out
from service.cli_table import print_table

if TYPE_CHECKING:
    from service.worker_schemas import GpuView

app = typer.Typer()


@app.command()
def workers(url: Url = DEFAULT_URL) -> None:
    """List the workers: what they work on, their GPUs, and what keeps them from taking jobs."""
    rows: list[tuple[str, ...]] = []
    with connected(url) as client:
        for worker in client.workers():
            state = ": ".join([worker.state, *(["; ".join(worker.problems)] if worker.problems else [])])
            gpus = ", ".join(_gpu(gpu) for gpu in worker.gpus)
            seen = f"{worker.heartbeat_at.astimezone():%Y-%m-%d %H:%M:%S}"
            rows.append((worker.id, state, ", ".join(worker.queues), worker.job_id or "", gpus, seen))
    print_table(out, rows, headings=("id", "state", "queues", "job", "GPUs", "last report"), ids=("id", "job"))


def _gpu(gpu: GpuView) -> str:
    parts = [gpu.name]
    if gpu.utilization is not None:
        parts.append(f"{gpu.utilization:.0%}")
    if gpu.memory_used_bytes is not None and gpu.memory_total_bytes is not None:
        parts.append(f"{gpu.memory_used_bytes / 1e9:.0f} of {gpu.memory_total_bytes / 1e9:.0f} GB")
    return " ".join(parts)
