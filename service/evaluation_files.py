"""A look at evaluation sets: are they there, and laid out as clip_benchmark's webdatasets are?"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from service.data_files import CHECK_PATH, MAX_SHARDS, files_problem, is_dir, is_file
from service.file_walk import FileWalk


def _declared_type(folder: Path) -> str:
    """What dataset_type.txt says; without one a set is for classification."""
    try:
        return (folder / "dataset_type.txt").read_text().strip()[:64] or "classification"
    except (OSError, ValueError):
        return "classification"


def evaluation_files(walk: FileWalk, path: str, split: str) -> Iterator[str]:
    """What is read of an evaluation set, its folder first, so that a look at the others ends at a folder that may not be read.

    Raises:
        TooMuchToWalkError: it leads to more looks than a spec may.
    """
    folder = Path(path)
    yield path
    yield from (str(folder / name) for name in ("classnames.txt", "zeroshot_classification_templates.txt", "dataset_type.txt"))
    yield str(folder / split)
    yield from (entry.path for entry in walk.entries(str(folder / split)))


class SetProblem(NamedTuple):
    """What is wrong with an evaluation set's `path` or `split`."""

    name: str
    problem: str
    remedy: str


def evaluation_problems(walk: FileWalk, kind: str, path: str, split_name: str) -> list[SetProblem]:
    """The layout of clip_benchmark's webdatasets: SPLIT/nshards.txt and SPLIT/0.tar …, and class names where classes are told apart.

    Raises:
        TooMuchToWalkError: it leads to more looks than a spec may.
    """
    folder, split = Path(path), Path(path) / split_name
    if not is_dir(folder):
        return [SetProblem("path", f"there is no folder {folder}", CHECK_PATH)]
    problems = []
    if kind == "zero_shot" and not is_file(folder / "classnames.txt"):
        remedy = "Put one class name a line there; a set with captions instead of classes belongs under `evaluation.retrieval`."
        problems.append(SetProblem("path", f"{folder} holds no classnames.txt", remedy))
    elif kind == "zero_shot" and not is_file(folder / "zeroshot_classification_templates.txt"):
        remedy = "Put one prompt a line there, such as `a photo of a {c}.`, where `{c}` stands for the class name."
        problems.append(SetProblem("path", f"{folder} holds no zeroshot_classification_templates.txt", remedy))
    declared = _declared_type(folder)
    if (declared == "retrieval") != (kind == "retrieval"):
        belongs = "retrieval" if declared == "retrieval" else "zero_shot"
        source = "by its dataset_type.txt" if is_file(folder / "dataset_type.txt") else "as it has no dataset_type.txt"
        what = f"{folder} is a {declared} set, {source}"
        problems.append(SetProblem("path", what, f"Move it to `evaluation.{belongs}`, or write its type into dataset_type.txt."))
    if not is_dir(split):
        splits = sorted(entry.name for entry in walk.entries(str(folder)) if is_file(f"{entry.path}/nshards.txt")) or ["none"]
        return [*problems, SetProblem("split", f"{folder} has no split `{split_name}`", f"Its splits are: {', '.join(splits)}.")]
    try:
        num_shards = int((split / "nshards.txt").read_text())
    except (OSError, ValueError):
        remedy = "Put the number of its tars there, which are named 0.tar, 1.tar, …"
        return [*problems, SetProblem("path", f"{split / 'nshards.txt'} doesn't hold a number", remedy)]
    if not 1 <= num_shards <= MAX_SHARDS:
        return [*problems, SetProblem("path", f"{split / 'nshards.txt'} says {num_shards}", f"Give 1 to {MAX_SHARDS} tars.")]
    walk.spend(num_shards)
    found = files_problem([split / f"{number}.tar" for number in range(num_shards)])
    return problems if found is None else [*problems, SetProblem("path", *found)]
