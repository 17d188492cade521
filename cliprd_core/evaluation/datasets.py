"""Evaluation sets in clip_benchmark's webdataset layout.

FOLDER/classnames.txt                           one class name a line; classification only
FOLDER/zeroshot_classification_templates.txt    one prompt a line, `{c}` standing for the name; classification only
FOLDER/dataset_type.txt                         `classification` (also where the file is missing) or `retrieval`
FOLDER/SPLIT/nshards.txt                        how many shards there are
FOLDER/SPLIT/0.tar, 1.tar, …                    KEY.png|jpg|jpeg|webp with KEY.cls (class number) or KEY.txt (a caption a line)
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, Literal, TypeVar

import numpy as np

from cliprd_core.data.errors import InvalidDataError
from cliprd_core.data.shard_index import load_shard_index
from cliprd_core.data.shard_reader import ShardReader
from cliprd_core.data.sources import PairSource, clean_caption
from cliprd_core.evaluation_spec import EvaluationSet
from cliprd_core.locations import ForbiddenLocationError, Locations

log = logging.getLogger(__name__)

Truth = TypeVar("Truth")
"""What is known of an image: its class number, or its captions."""

CLASSNAMES_FILE = "classnames.txt"
TEMPLATES_FILE = "zeroshot_classification_templates.txt"
TYPE_FILE = "dataset_type.txt"
NUM_SHARDS_FILE = "nshards.txt"
PLACEHOLDER = "{c}"


@dataclass(frozen=True)
class KnownImage(Generic[Truth]):
    """An image, still encoded, and what is known of it."""

    key: str
    image_bytes: bytes
    truth: Truth


@dataclass(frozen=True)
class ImageSet(Generic[Truth]):
    """The images of a set, by number."""

    num_images: int
    read: Callable[[int], KnownImage[Truth]]
    """Raises CorruptSampleError. Called from several threads at once."""


@dataclass(frozen=True)
class ClassificationSet:
    """A labelled set."""

    images: ImageSet[int]  # class numbers are below len(classnames)
    classnames: list[str]
    templates: list[str]  # each with `{c}`


def load_classification_set(spec: EvaluationSet, cache_dir: Path | None = None) -> ClassificationSet:
    """Open a labelled set.

    Raises:
        InvalidDataError: a file is missing or malformed; the message names it and what the layout needs.
    """
    folder = Path(spec.path)
    _check_type(folder, "classification")
    classnames = _lines(folder / CLASSNAMES_FILE, "one class name a line")
    templates = _lines(folder / TEMPLATES_FILE, f"one prompt a line, such as `a photo of a {PLACEHOLDER}.`")
    for template in templates:
        if PLACEHOLDER not in template:
            raise InvalidDataError(f"{folder / TEMPLATES_FILE}: {template!r} lacks {PLACEHOLDER}, which stands for the class name")

    def label(key: str, content: bytes) -> int:
        try:
            number = int(content)
        except ValueError as error:
            raise InvalidDataError(f"{key}.cls holds {content[:40]!r}; it must hold a class number") from error
        if not 0 <= number < len(classnames):
            raise InvalidDataError(
                f"{key}.cls holds class {number}, but {folder / CLASSNAMES_FILE} names classes 0 to {len(classnames) - 1}"
            )
        return number

    return ClassificationSet(_open_shards(folder, spec.split, "labels", label, cache_dir), classnames, templates)


def load_retrieval_set(spec: EvaluationSet, cache_dir: Path | None = None) -> ImageSet[list[str]]:
    """Open an image-text set: images with at least one caption each.

    Raises:
        InvalidDataError: a file is missing or malformed; the message names it and what the layout needs.
    """
    folder = Path(spec.path)
    _check_type(folder, "retrieval")

    def captions(key: str, content: bytes) -> list[str]:
        return [line.strip() for line in clean_caption(key, content).splitlines() if line.strip()]

    return _open_shards(folder, spec.split, "captions", captions, cache_dir)


def retrieval_set_of_pairs(pairs: PairSource) -> ImageSet[list[str]]:
    """Held-out training pairs as a retrieval set of one caption an image."""

    def read(index: int) -> KnownImage[list[str]]:
        sample = pairs.read(index)
        return KnownImage(sample.key, sample.image_bytes, [sample.caption])

    return ImageSet(len(pairs), read)


def _open_shards(
    folder: Path, split: str, kind: Literal["labels", "captions"], parse: Callable[[str, bytes], Truth], cache_dir: Path | None
) -> ImageSet[Truth]:
    """The images of a split that have a member of `kind`, which `parse(key, content)` reads."""
    file = folder / split / NUM_SHARDS_FILE
    lines = _lines(file, "the number of shards")
    if not (lines[0].isdecimal() and int(lines[0]) > 0):
        raise InvalidDataError(f"{file} holds {lines[0]!r}; it must hold the number of shards of the split")
    paths = [folder / split / f"{number}.tar" for number in range(int(lines[0]))]
    for path in paths:
        _check_allowed(path)
        if not path.exists():
            raise InvalidDataError(
                f"{path} is missing; {file} says that there are {len(paths)} shards, named 0.tar to {len(paths) - 1}.tar"
            )
    shards = [load_shard_index(path, cache_dir) for path in paths]
    rows = np.flatnonzero(np.concatenate([getattr(shard, kind).present for shard in shards])).tolist()
    reader = ShardReader(shards)
    member = "KEY.cls with a class number" if kind == "labels" else "KEY.txt with a caption a line"
    if not rows:
        raise InvalidDataError(f"no image in the shards of {folder / split} can be used; each needs {member} beside it")
    if len(rows) < len(reader):
        log.warning("%d of %d images in %s are left out, since they lack %s", len(reader) - len(rows), len(reader), folder / split, member)

    def read(index: int) -> KnownImage[Truth]:
        row = rows[index]
        key = reader.key(row)
        image_bytes, truth = reader.read(row, "images", kind)
        return KnownImage(key, image_bytes, parse(key, truth))

    return ImageSet(len(rows), read)


def _check_type(folder: Path, wanted: str) -> None:
    _check_allowed(folder)
    if not folder.is_dir():
        raise InvalidDataError(f"there is no folder {folder}; check the `path` of the evaluation set")
    file = folder / TYPE_FILE
    found = _lines(file, "`classification` or `retrieval`")[0].lower() if file.exists() else "classification"
    if found != wanted:
        place = "`evaluation.zero_shot`" if found == "classification" else "`evaluation.retrieval`"
        raise InvalidDataError(f"{folder} is a {found} set, as {TYPE_FILE} (or its absence) says; list it under {place}")


def _check_allowed(path: Path) -> None:
    try:
        Locations.from_environment().check_path(path)
    except ForbiddenLocationError as error:
        raise InvalidDataError(f"an evaluation set's `path`: {error}") from error


def _lines(file: Path, content: str) -> list[str]:
    """The lines of a text file that are not blank, stripped."""
    _check_allowed(file)
    try:
        lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except FileNotFoundError as error:
        raise InvalidDataError(f"{file} is missing; it must hold {content}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidDataError(f"{file} cannot be read: {error}; it must hold {content}") from error
    if not lines:
        raise InvalidDataError(f"{file} is empty; it must hold {content}")
    return lines
