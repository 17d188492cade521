"""Globs of specs: they name what the standard library's `glob` says, and don't walk further than one spec may."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cliprd_core.locations import Locations
from cliprd_core.spec import JobSpec
from service import file_walk
from service.file_walk import FileWalk, TooMuchToWalkError
from service.problems import FieldProblem, SpecError
from service.spec_check import check_parts, check_spec
from tests.store_helpers import spec_dict, write_table, write_tar


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for name in ("a/b/c/1.tar", "a/b/2.tar", "a/3.tar", "a/.hidden/4.tar", "a/.5.tar", "a/b/notes.txt", "x[1]/6.tar", "7.tar"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        write_tar(tmp_path / name, 1)
    (tmp_path / "link").symlink_to(tmp_path / "a/b")
    (tmp_path / "broken").symlink_to(tmp_path / "nowhere")
    write_table(tmp_path)
    return tmp_path


PATTERNS = ["*/*.tar", "**/*.tar", "a/**/*.tar", "a/**", "**/b/**/*.tar", "a/**/**/?.tar", "a/.*", "a/.h*/*", "[ab]/?.tar", "*/b/*",
            "x[[]1]/*", "br*", "*/", "a/b*/c/../2.tar", "no*", "no/*.tar", "7.tar/*", "a/*/c/1.tar"]  # fmt: skip


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_glob_names_what_the_standard_library_says(tree: Path, pattern: str) -> None:
    name = os.path.normpath(tree / pattern)
    expected = {os.path.normpath(match) for match in glob.glob(name, recursive=True)}  # noqa: PTH207  Path.glob takes no absolute pattern
    assert FileWalk().matches(name, limit=1000) == sorted(expected)


def test_entries_count_whether_they_match_or_not(tree: Path) -> None:
    walk = FileWalk(max_entries=8)  # the folder holds 7.tar, a, broken, link, pairs.tsv and x[1]
    assert walk.matches(f"{tree}/*.tar", limit=1000) == [f"{tree}/7.tar"]
    assert walk.matches(f"{tree}/*.tar", limit=1000) == [f"{tree}/7.tar"]  # remembered
    assert not walk.is_used_up
    with pytest.raises(TooMuchToWalkError, match="more than 8"):
        walk.matches(f"{tree}/*.png", limit=1000)
    assert walk.is_used_up


def test_time_counts_too(tree: Path) -> None:
    with pytest.raises(TooMuchToWalkError, match="longer than 0 s"):
        FileWalk(max_seconds=0).matches(f"{tree}/**/*.tar", limit=1000)


def problems(root: Path, **changes: Any) -> list[FieldProblem]:
    with pytest.raises(SpecError) as caught:
        check_spec(JobSpec.model_validate(spec_dict(**changes)), data_root=root, locations=Locations.of([root], ()))
    return caught.value.problems


def shards(*patterns: str) -> dict[str, Any]:
    return {"data": {"train": [{"type": "webdataset", "shards": pattern} for pattern in patterns]}}


def test_alternatives_that_share_a_glob_have_it_walked_once(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file_walk, "MAX_ENTRIES", 100)
    many = shards("a/{,,,,,,,,,}{,,,,,,,,,}{,,,,,,,,,}**/1.tar")  # 1,000 of one
    assert check_spec(JobSpec.model_validate(spec_dict(**many)), data_root=tree)


def test_too_many_walks_are_refused_at_the_first_field_that_leads_to_them(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file_walk, "MAX_ENTRIES", 100)
    many = "**/{" + ",".join(f"[{number}1]" for number in range(20)) + "}.tar"
    given = shards("7.tar", "a/?.tar", many, many, "a/*.tar")
    assert [(one.field, one.problem) for one in problems(tree, **given)] == [
        ("data.train.2.shards", "makes the files and folders that this spec has looked at more than 100")
    ]


def evaluation_set(root: Path) -> None:
    (root / "set/test").mkdir(parents=True)
    for name in ("classnames.txt", "zeroshot_classification_templates.txt"):
        (root / "set" / name).write_text("{c}\n")
    (root / "set/test/nshards.txt").write_text("1")
    write_tar(root / "set/test/0.tar", 1)


def test_sets_of_one_folder_are_looked_at_once_whatever_their_names(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    evaluation_set(tree)
    read: list[str] = []
    entries = FileWalk.entries

    def counted(walk: FileWalk, folder: str) -> Iterator[os.DirEntry[str]]:
        read.append(folder)
        return entries(walk, folder)

    monkeypatch.setattr(FileWalk, "entries", counted)
    sets = [{"name": str(number), "path": "set"} for number in range(20)]
    spec = JobSpec.model_validate(spec_dict(evaluation={"zero_shot": sets}))
    check_spec(spec, data_root=tree, locations=Locations.of([tree], ()))
    assert read == [f"{tree}/set/test"]


def test_evaluation_sets_count_too_also_in_a_spec_that_is_not_sound_as_a_whole(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    evaluation_set(tree)
    monkeypatch.setattr(file_walk, "MAX_ENTRIES", 1)
    evaluation = {"zero_shot": ["set"]}
    [found] = problems(tree, evaluation=evaluation)
    assert (found.field, found.problem) == (
        "evaluation.zero_shot.0.path",
        "makes the files and folders that this spec has looked at more than 1",
    )
    assert check_parts({"evaluation": evaluation}, data_root=tree, locations=Locations.of([tree], ())) == [found]
