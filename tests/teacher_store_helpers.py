"""Keys of small teacher stores. Imports no torch, as tests of the service and the worker use it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cliprd_core.store_dir import StoreKey, add_usage, create_store


def make_key(**changes: Any) -> StoreKey:
    """The key of a store of 12 pairs, two views and 8 numbers a feature."""
    parts: dict[str, Any] = {
        "teacher_sha256": "ab" * 32,
        "teacher_config": {"embed_dim": 8, "vision_cfg": {"image_size": 32}},
        "data_fingerprint": "cd" * 32,
        "num_samples": 12,
        "transform": {"image_size": 32, "mean": [0.5, 0.5, 0.5]},
        "crop_scale": (0.9, 1.0),
        "num_views": 2,
        "seed": 0,
        "precision": "fp32",
        "width": 8,
    }
    return StoreKey(**(parts | changes))


def make_store(root: Path, **changes: Any) -> str:
    """An empty store that was just used; its digest."""
    key = make_key(**changes)
    create_store(root, key, teacher="ViT-B-16", data="shards/{00..07}.tar")
    add_usage(root / key.digest, hits=0, misses=0, filled=(0, 0))
    return key.digest
