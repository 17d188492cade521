"""Where what a spec names lies: only where jobs may read, and, of local shards, sound files."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TypeVar

from cliprd_core.locations import ForbiddenLocationError, Locations, ServiceFileError
from service import data_files
from service.evaluation_files import evaluation_files
from service.file_walk import FileWalk

Place = TypeVar("Place")


def paths_problem(locations: Locations, paths: Sequence[str]) -> data_files.Found:
    return location_problem(locations.check_paths, [paths])


def evaluation_problem(walk: FileWalk, locations: Locations, path: str, split: str) -> data_files.Found:
    return location_problem(locations.check_paths, [evaluation_files(walk, path, split)])


def local_place_problem(locations: Locations, pattern: str) -> data_files.Found:
    """The folders in which globs look, and what is named without any, must lie where jobs may read."""
    return location_problem(locations.check_paths, [data_files.expand_folders(pattern)])


def local_problem(walk: FileWalk, locations: Locations, pattern: str) -> data_files.Found:
    """So must what is found, before a look at any of it."""
    files: list[Path] = []
    missing: data_files.Found = None
    try:
        files.extend(itertools.islice(data_files.expand_shards(walk, pattern), data_files.MAX_SHARDS + 1))
    except FileNotFoundError as error:
        missing = f"no file matches {error.filename}", data_files.CHECK_PATH
    too_many = data_files.num_shards_problem(len(files))
    unique = list(dict.fromkeys(files))
    return location_problem(locations.check_paths, [map(str, unique)]) or missing or too_many or data_files.files_problem(unique)


def remote_problem(locations: Locations, pattern: str) -> data_files.Found:
    return location_problem(locations.check_url, data_files.expand_remote(pattern))


def location_problem(check: Callable[[Place], None], places: Iterable[Place]) -> data_files.Found:
    """The first of the places that jobs may not read from."""
    for place in places:
        try:
            check(place)
        except ServiceFileError as error:
            remedy = 'Keep data elsewhere; a trained model is named by {"job": ID} or {"artifact": ID}.'
            return str(error), remedy
        except ForbiddenLocationError as error:
            return str(error), "Move the data there, or ask the service's operator to allow it (CLIPRD_DATA_ROOTS, CLIPRD_REMOTE_HOSTS)."
    return None
