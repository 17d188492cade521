"""Which teacher stores a run uses: the key of each, and where they lie."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cliprd_core.data.batch import FeatureStore
from cliprd_core.data.batch_builder import largest_image_size
from cliprd_core.data.sources import PairSource
from cliprd_core.models import LoadedModel
from cliprd_core.run_dir import TEACHER_STORE_VARIABLE
from cliprd_core.spec import DataSource, JobSpec, WebDatasetSource
from cliprd_core.store_dir import StoreInUseError, StoreKey
from cliprd_core.teacher_store import open_store, rounded_features

logger = logging.getLogger(__name__)

STORES_DIR = "teacher-stores"
"""Folder inside the run directory, where the environment names no shared one."""


def open_teacher_stores(
    spec: JobSpec,
    run_dir: Path,
    source: PairSource,
    *,
    student: LoadedModel,
    teachers: Sequence[LoadedModel],
    device: torch.device,
    autocast_type: torch.dtype | None,
) -> Sequence[FeatureStore | None]:
    """The store of each teacher; None where the spec wants none. Where there can't be one it keeps nothing, so the teacher runs in every
    step, on features of the same rounding: a later attempt that has a store goes on with the same numbers.

    Args:
        source: the training pairs.
        device: where the teachers run.
        autocast_type: the type of the teachers' matrix products; None: fp32.
    """
    if spec.data.teacher_views == 0:
        return [None] * len(teachers)
    root = Path(os.environ.get(TEACHER_STORE_VARIABLE) or run_dir / STORES_DIR)
    size = largest_image_size(student.model_input, [teacher.model_input for teacher in teachers])
    precision = f"{'fp32' if autocast_type is None else str(autocast_type).removeprefix('torch.')} on {device.type}"
    return [_open(root, _key(spec, source, teacher, size, precision), spec, teacher) for teacher in teachers]


def _open(root: Path, key: StoreKey, spec: JobSpec, teacher: LoadedModel) -> FeatureStore:
    data = ", ".join(_name(source) for source in spec.data.train)
    try:
        return open_store(root, key, teacher=teacher.name or f"weights {key.teacher_sha256[:12]}", data=data)
    except (OSError, StoreInUseError) as error:
        logger.warning("the teacher's features are not kept, so it runs in every step: its store in %s cannot be used: %s", root, error)
        return _NoStore(key.width)


class _NoStore:
    """Takes a store's place and forgets everything."""

    def __init__(self, width: int) -> None:
        self._width = width

    def read_images(self, indices: NDArray[np.int64], view: int) -> tuple[Tensor, Tensor]:
        del view
        return self.read_texts(indices)

    def read_texts(self, indices: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        return torch.zeros(len(indices), self._width, dtype=torch.float16), torch.zeros(len(indices), dtype=torch.bool)

    def rounded(self, features_bD: Tensor) -> Tensor:
        return rounded_features(features_bD, torch.float16)

    def write_images(self, indices: NDArray[np.int64], view: int, features_bD: Tensor) -> None:
        del indices, view, features_bD

    def write_texts(self, indices: NDArray[np.int64], features_bD: Tensor) -> None:
        del indices, features_bD

    def close(self) -> None:
        pass


def _key(spec: JobSpec, source: PairSource, teacher: LoadedModel, largest_size: int, precision: str) -> StoreKey:
    assert teacher.weights_sha256 is not None, "a teacher has weights"
    preprocess = teacher.preprocess
    transform: dict[str, Any] = {
        "image_size": preprocess.image_size,
        "mean": list(preprocess.mean),
        "std": list(preprocess.std),
        "interpolation": preprocess.interpolation,
        "decoded_for_image_size": largest_size,
        "context_length": teacher.context_length,
        "tokenizer": _tokenizer_digest(teacher),
    }
    return StoreKey(
        teacher_sha256=teacher.weights_sha256,
        teacher_config=teacher.config,
        data_fingerprint=source.fingerprint,
        num_samples=len(source),
        transform=transform,
        crop_scale=spec.data.crop_scale,
        num_views=spec.data.teacher_views,
        seed=spec.training.seed,
        precision=precision,
        width=teacher.embed_dim,
    )


PROBES = (
    "a photo of a cat",
    "A PHOTO of a Cat, sitting on 2 mats (1998)!",
    "naïve café — “déjà vu” …  with   spaces\tand\nlines",
    "&amp; &lt;b&gt;bold&lt;/b&gt; #hashtag @name http://example.org/x?y=1&z=2",
    "日本の猫 кошка قطة 🐈‍⬛ ½ ﬁ",
    "supercalifragilisticexpialidocious antidisestablishmentarianism pneumonoultramicroscopicsilicovolcanoconiosis",
    "word " * 100,
    "",
)


def _tokenizer_digest(teacher: LoadedModel) -> str:
    """Names a tokenizer by what it makes of some texts: two that differ in vocabulary, merges or cleaning hardly agree on all of them."""
    ids = teacher.tokenizer(list(PROBES))
    return hashlib.sha256(ids.to(torch.int64).numpy().astype("<i8").tobytes()).hexdigest()[:16]


def _name(source: DataSource) -> str:
    return source.shards if isinstance(source, WebDatasetSource) else source.path
