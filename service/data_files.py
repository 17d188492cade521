"""A look at the files that a spec names: are they there, and of the layout they should be? Contents are not read beyond a header."""

from __future__ import annotations

import csv
import glob
import itertools
import math
import os
import re
import tarfile
from collections.abc import Callable, Iterator
from functools import lru_cache
from itertools import islice
from pathlib import Path
from urllib.parse import urlsplit

from braceexpand import braceexpand

from cliprd_core.spec import CsvSource
from service.file_walk import FileWalk
from service.problems import FieldProblem, closest

Found = tuple[str, str] | None
"""Problem and remedy, or nothing."""

Look = Callable[[str], Found]

MAX_SHARDS = 100_000
MAX_NAME_CHARACTERS = 2**25
"""Of all names of a pattern together: they are in memory at once."""
MAX_HEADER_CHARACTERS = 1_000_000
MAX_LOOKS_INSIDE = 64  # shards opened for a look at their first header
MAX_BYTES_COUNTED = 64 * 2**20  # tars and tables that are larger together are not counted at submission
MAX_COUNTS_KEPT = 4096
WEIGHTS = (".safetensors", ".bin")
CHECK_PATH = "Check the path; relative ones start from the service's data folder."

_INT_RANGE = re.compile(r"\{(-?\d+)\.\.(-?\d+)(?:\.\.-?(\d+))?\}")
_ADDRESS = re.compile(r"(?:^|/)(?:[a-z][a-z0-9+.-]*:/|pipe:)")


def is_file(path: Path | str) -> bool:
    """Whether there is such a file that we may know of; unlike pathlib's, it takes names that are too long for a file."""
    return os.path.isfile(path)  # noqa: PTH113


def is_dir(path: Path | str) -> bool:
    """As `is_file`, for folders."""
    return os.path.isdir(path)  # noqa: PTH112


def pattern_problem(pattern: str) -> Found:
    """A pattern of paths must be well-formed, and name no more shards than can be read. No file is looked at."""
    if _ADDRESS.search(pattern):
        remedy = "Give a path, or an address that begins with s3://, http:// or https://; or mount the data."
        return "is an address of a kind that isn't read", remedy
    found = _ranges_problem(pattern)
    if found is not None:
        return found
    try:
        num_names = count_names(pattern)
    except ValueError:
        return f"`{pattern}` has unbalanced braces", "Write a range as {00000..00007}."
    return num_shards_problem(num_names) or _length_problem(num_names, pattern)


def count_names(pattern: str) -> int:
    """Names of a pattern whose ranges are not too wide; of too many, some that are too many.

    Raises:
        ValueError: unbalanced braces.
    """
    return len(_names(pattern))


@lru_cache(maxsize=2)
def _names(pattern: str) -> tuple[str, ...]:
    """Kept, as each check asks for them again, and expanding braces takes longer than most."""
    return tuple(islice(braceexpand(pattern), MAX_SHARDS + 1))


def _ranges_problem(pattern: str) -> Found:
    num_in_ranges = math.prod(abs(int(end) - int(start)) // (int(step or 1) or 1) + 1 for start, end, step in _INT_RANGE.findall(pattern))
    if num_in_ranges > MAX_SHARDS:
        return f"names {num_in_ranges} shards; at most {MAX_SHARDS} are read", "Use narrower ranges, or fewer and larger shards."
    return None


def remote_problem(pattern: str) -> Found:
    """Every address that brace ranges name must be well-formed. No server is asked."""
    found = _ranges_problem(pattern)
    if found is not None:
        return found
    try:
        num_names = count_names(pattern)
        too_many = num_shards_problem(num_names) or _length_problem(num_names, pattern)
        addresses = [] if too_many else [(url, urlsplit(url)) for url in expand_remote(pattern)]
    except ValueError as error:
        return f"`{pattern}` is no pattern of addresses: {error}", "Write a range as {00000..00007}, and brackets only in a host's number."
    if too_many is not None:
        return too_many
    for url, part in addresses:
        if part.scheme not in ("s3", "http", "https") or not part.netloc or part.path in ("", "/") or any(c.isspace() for c in url):
            return f"`{url}` is no address of a shard", "Write s3://BUCKET/KEY.tar or https://HOST/PATH.tar."
        if part.scheme != "s3" and "*" in part.path:
            return f"`{url}` holds a `*`, but HTTP lists no files", "Write a range as {00000..00007}."
    return None


def num_shards_problem(num_shards: int) -> Found:
    """A source may name so many and no more."""
    return (f"names more than {MAX_SHARDS} shards", "Use fewer and larger shards.") if num_shards > MAX_SHARDS else None


def _length_problem(num_names: int, pattern: str) -> Found:
    if num_names * len(pattern) <= MAX_NAME_CHARACTERS:
        return None
    return f"names {num_names} shards at great length", f"Use shorter paths or fewer shards: {MAX_NAME_CHARACTERS} characters in all."


def files_problem(files: list[Path]) -> Found:
    """All of these must be non-empty files, and those that begin as a tar does, as far as they are looked into."""
    bad = [file for file in files if not (is_file(file) and os.access(file, os.R_OK) and file.stat().st_size)]
    if not bad:
        return next((problem for file in files[:MAX_LOOKS_INSIDE] if (problem := _tar_problem(file)) is not None), None)
    what = "is no readable file with content" if is_file(bad[0]) or is_dir(bad[0]) else "is missing"
    others = f" (and {len(bad) - 1} more of {len(files)})" if len(bad) > 1 else ""
    return f"{bad[0]} {what}{others}", CHECK_PATH


def _tar_problem(file: Path) -> Found:
    """A shard begins with a tar header."""
    with file.open("rb") as opened:
        header = opened.read(tarfile.BLOCKSIZE)
    if header.startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")):
        return f"{file} is compressed", "Unpack it to a plain tar: pairs are read at random places. Its images are compressed already."
    try:
        tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        return f"{file} is no tar file", "Give tar shards of KEY.png (or .jpg, .webp) and KEY.txt; a table of pairs has type `csv`."
    return None


def identity_of(status: os.stat_result) -> tuple[int, ...]:
    """Tells what a file holds now from what it holds once it was written again."""
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def count_pairs(shard: Path) -> int | None:
    """Captions in a tar, found by its headers alone. None: it is cut off or otherwise unreadable."""
    try:
        return _count_pairs(shard, identity_of(shard.stat()))
    except OSError:
        return None


@lru_cache(maxsize=MAX_COUNTS_KEPT)
def _count_pairs(shard: Path, identity: tuple[int, ...]) -> int | None:  # noqa: ARG001  it tells the file of today from another
    """Kept, as many submissions name the same shards."""
    try:
        with tarfile.open(shard, mode="r:") as opened:
            return sum(member.name.endswith(".txt") for member in opened)
    except (OSError, tarfile.TarError):
        return None


def expand_remote(pattern: str) -> Iterator[str]:
    """The addresses of a well-formed pattern."""
    return iter(_names(pattern))


def expand_folders(pattern: str) -> Iterator[str]:
    """For each name of a well-formed pattern: itself, or the folder from which its glob starts to look, without `..`."""
    for given in dict.fromkeys(_names(pattern)):
        name = os.path.normpath(given)
        if glob.has_magic(name):
            name = str(Path(*itertools.takewhile(lambda part: not glob.has_magic(part), Path(name).parts)))
        yield name


def expand_shards(walk: FileWalk, pattern: str) -> Iterator[Path]:
    """The files that an absolute pattern names.

    Raises:
        ValueError: unbalanced braces.
        FileNotFoundError: a glob matches nothing.
        TooMuchToWalkError: it leads to more looks than a spec may.
    """
    found: dict[str, list[Path]] = {}  # a few characters of braces make one name many times
    for given in _names(pattern):
        if given not in found:
            found[given] = _files_of(walk, os.path.normpath(given))
        yield from found[given]


def _files_of(walk: FileWalk, name: str) -> list[Path]:
    if not glob.has_magic(name) or is_file(name):
        return [Path(name)]
    matches = walk.matches(name, limit=MAX_SHARDS + 1)
    if not matches:
        raise FileNotFoundError(2, "no match", name)
    return [Path(match) for match in matches]


def checkpoint_problem(path: str) -> Found:
    """A checkpoint is a non-empty file."""
    file = Path(path)
    if not is_file(file):
        return f"there is no file {path}", "Give the path of a checkpoint file, or a tag of open_clip's."
    if file.stat().st_size == 0:
        return f"{path} is empty", "Copy the checkpoint again."
    return None


def local_dir_files(path: str) -> list[str]:
    """What is read of a `local-dir:` folder."""
    weights = (f"{stem}{suffix}" for stem in ("open_clip_model", "open_clip_pytorch_model", "model", "pytorch_model") for suffix in WEIGHTS)
    return [f"{path}/{name}" for name in ("open_clip_config.json", *weights)]


def local_dir_problem(path: str) -> Found:
    """A `local-dir:` folder holds a config and weights."""
    folder = Path(path)
    if not is_dir(folder):
        return f"there is no folder {path}", "Give a folder that holds open_clip_config.json and the weights."
    if not is_file(folder / "open_clip_config.json"):
        return f"{path} holds no open_clip_config.json", "Give a folder that holds open_clip_config.json and the weights."
    if not any(name.endswith(WEIGHTS) for name in _names_in(folder)):
        return f"{path} holds no weights", "Put open_clip_model.safetensors into it."
    return None


def _names_in(folder: Path) -> Iterator[str]:
    with os.scandir(folder) as entries:
        yield from (entry.name for entry in islice(entries, MAX_SHARDS))


def table_problems(field: str, source: CsvSource) -> list[FieldProblem]:
    """The table must have the named columns and at least one row, its image folder must exist."""
    problems = []
    if source.image_root is not None and not is_dir(source.image_root):
        remedy = "Give the folder that the table's relative paths start from, or null for the table's own."
        problems.append(FieldProblem(field=f"{field}.image_root", problem=f"there is no folder {source.image_root}", remedy=remedy))
    try:
        with Path(source.path).open(newline="", encoding="utf-8-sig") as file:
            header = next(csv.reader([file.readline(MAX_HEADER_CHARACTERS)], delimiter=source.separator), [])
            has_rows = bool(file.read(1))
    except OSError as error:
        return [*problems, FieldProblem(field=f"{field}.path", problem=f"can't read {source.path}: {error.strerror}", remedy=CHECK_PATH)]
    except (UnicodeDecodeError, csv.Error, ValueError, TypeError) as error:
        remedy = "Save it as UTF-8 text with one header line, and set `separator` to the character between its columns."
        return [*problems, FieldProblem(field=f"{field}.path", problem=f"{source.path} is no such table: {error}", remedy=remedy)]
    if not has_rows:
        problems.append(FieldProblem(field=f"{field}.path", problem=f"{source.path} has no rows below its header", remedy="Add pairs."))
    return problems + _column_problems(field, source, header)


def _column_problems(field: str, source: CsvSource, header: list[str]) -> list[FieldProblem]:
    problems = []
    for name in ("image_column", "caption_column"):
        column = getattr(source, name)
        if column not in header:
            columns = ", ".join(f"`{one[:64]}`" for one in header[:20]) or "none"
            near = closest(column, header, count=1) if len(header) > 1 else []  # a single column was split at the wrong character
            hint = f"Did you mean `{near[0]}`?" if near else "Set it to one of them, or set `separator` to what stands between them."
            problem = f"{source.path} has no column `{column}`; split at {source.separator!r}, its columns are {columns}"
            problems.append(FieldProblem(field=f"{field}.{name}", problem=problem, remedy=hint))
    return problems
