"""How many pairs a source has at most, as far as that is known at submission without reading much."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

from cliprd_core.spec import CsvSource, DataSource, JobSpec, WebDatasetSource
from service import data_files
from service.file_walk import FileWalk


def at_most_num_pairs(walk: FileWalk, source: DataSource) -> int | None:
    """The pairs that a source has at most. None: unknown without much reading.

    `sizes.json` beside the shards, as webdataset's tools write it, gives the number of samples of each shard; small ones are counted.

    Raises:
        TooMuchToWalkError: it leads to more looks than a spec may.
    """
    counted = _rows_of(source) if isinstance(source, CsvSource) else _pairs_of(walk, source)
    known = [number for number in (counted, source.num_samples) if number is not None]
    return min(known, default=None)


def known_num_pairs(spec: JobSpec, count: Callable[[DataSource], int | None]) -> int | None:
    """The training pairs of a resolved spec, at most, as `count` finds those of a source: unreadable ones are among them. None: unknown
    without much reading."""
    counts = [count(source) for source in spec.data.train]
    return None if None in counts else sum(count for count in counts if count is not None)


def num_steps_of(spec: JobSpec, num_pairs: int) -> int:
    """Optimiser updates of a whole run; the pairs that fill no batch at an epoch's end are left out."""
    return num_pairs // spec.training.global_batch_size * spec.training.epochs


def _rows_of(source: CsvSource) -> int | None:
    """Lines below a small table's header: never fewer than its rows."""
    table = Path(source.path)
    status = table.stat()
    if status.st_size > data_files.MAX_BYTES_COUNTED:
        return None
    return _num_rows(table, data_files.identity_of(status))


@lru_cache(maxsize=data_files.MAX_COUNTS_KEPT)
def _num_rows(table: Path, identity: tuple[int, ...]) -> int:  # noqa: ARG001  it tells the file of today from another
    """Kept, as one spec may name a table hundreds of times."""
    return max(0, len(table.read_bytes().splitlines()) - 1)


def _pairs_of(walk: FileWalk, source: WebDatasetSource) -> int | None:
    if source.is_remote:
        return None
    shards = list(data_files.expand_shards(walk, source.shards))
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
