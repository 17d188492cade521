"""Which teacher stores a run uses: the key of each, and where they lie."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from cliprd_core.data.batch_builder import largest_image_size
from cliprd_core.data.sources import PairSource
from cliprd_core.models import LoadedModel
from cliprd_core.run_dir import TEACHER_STORE_VARIABLE
from cliprd_core.spec import DataSource, JobSpec, WebDatasetSource
from cliprd_core.store_dir import StoreInUseError, StoreKey
from cliprd_core.teacher_store import TeacherStore, open_store

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
    autocast_type: torch.dtype | None,
) -> list[TeacherStore | None]:
    """The store of each teacher; None where the spec wants none, or where there can't be one: then the teacher runs in every step.

    Args:
        source: the training pairs.
        autocast_type: the type of the teachers' matrix products; None: fp32.
    """
    if spec.data.teacher_views == 0:
        return [None] * len(teachers)
    root = Path(os.environ.get(TEACHER_STORE_VARIABLE) or run_dir / STORES_DIR)
    size = largest_image_size(student.model_input, [teacher.model_input for teacher in teachers])
    return [_open(root, _key(spec, source, teacher, size, autocast_type), spec, teacher) for teacher in teachers]


def _open(root: Path, key: StoreKey, spec: JobSpec, teacher: LoadedModel) -> TeacherStore | None:
    data = ", ".join(_name(source) for source in spec.data.train)
    try:
        return open_store(root, key, teacher=teacher.name or "a model without a name", data=data)
    except (OSError, StoreInUseError) as error:
        logger.warning("the teacher's features are not kept, so it runs in every step: its store in %s cannot be used: %s", root, error)
        return None


def _key(spec: JobSpec, source: PairSource, teacher: LoadedModel, largest_size: int, autocast_type: torch.dtype | None) -> StoreKey:
    assert teacher.weights_sha256 is not None, "a teacher has weights"
    preprocess = teacher.preprocess
    transform: dict[str, Any] = {
        "image_size": preprocess.image_size,
        "mean": list(preprocess.mean),
        "std": list(preprocess.std),
        "interpolation": preprocess.interpolation,
        "decoded_for_image_size": largest_size,
        "context_length": teacher.context_length,
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
        precision="fp32" if autocast_type is None else str(autocast_type).removeprefix("torch."),
        width=teacher.embed_dim,
    )


def _name(source: DataSource) -> str:
    return source.shards if isinstance(source, WebDatasetSource) else source.path
