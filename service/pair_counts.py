"""How many pairs a source has at most, as far as that is known at submission without reading much."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cliprd_core.spec import CsvSource, DataSource, JobSpec, WebDatasetSource
from service import data_files


def at_most_num_pairs(source: DataSource) -> int | None:
    """The pairs that a source has at most. None: unknown without much reading.

    `sizes.json` beside the shards, as webdataset's tools write it, gives the number of samples of each shard; small ones are counted.
    """
    counted = _rows_of(source) if isinstance(source, CsvSource) else _pairs_of(source)
    known = [number for number in (counted, source.num_samples) if number is not None]
    return min(known, default=None)


def known_num_pairs(spec: JobSpec, *, count: Callable[[DataSource], int | None] = at_most_num_pairs) -> int | None:
    """The training pairs of a resolved spec, at most: unreadable ones are among them. None: unknown without much reading."""
    counts = [count(source) for source in spec.data.train]
    return None if None in counts else sum(count for count in counts if count is not None)


def num_steps_of(spec: JobSpec, num_pairs: int) -> int:
    """Optimiser updates of a whole run; the pairs that fill no batch at an epoch's end are left out."""
    return num_pairs // spec.training.global_batch_size * spec.training.epochs


def _rows_of(source: CsvSource) -> int | None:
    """Lines below a small table's header: never fewer than its rows."""
    table = Path(source.path)
    if table.stat().st_size > data_files.MAX_BYTES_COUNTED:
        return None
    return max(0, len(table.read_bytes().splitlines()) - 1)


def _pairs_of(source: WebDatasetSource) -> int | None:
    if source.is_remote:
        return None
    shards = list(data_files.expand_shards(source.shards))
    sizes: dict[Path, dict[str, Any]] = {}
    total = 0
    is_small = sum(shard.stat().st_size for shard in shards) <= data_files.MAX_BYTES_COUNTED
    for shard in shards:
        if shard.parent not in sizes:
            sizes[shard.parent] = _read_sizes(shard.parent / "sizes.json")
        size = sizes[shard.parent].get(shard.name)
        if not isinstance(size, int) or isinstance(size, bool):
            size = data_files.count_pairs(shard) if is_small else None
        if size is None:
            return None
        total += size
    return total


def _read_sizes(path: Path) -> dict[str, Any]:
    """What the file says; nothing where there is none or it is of another make."""
    try:
        loaded = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return loaded if isinstance(loaded, dict) else {}
