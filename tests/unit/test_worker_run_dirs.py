"""Run directories of deleted jobs go; all others stay."""

from __future__ import annotations

import fcntl
import logging
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from service.store.unneeded_runs import LocalRun
from tests.fake_trainer import save
from worker import run_dirs
from worker.run_dirs import in_use, remove_run_dirs, run_dirs_of


def make(root: Path, *names: str) -> None:
    for name in names:
        (root / name / "checkpoints" / "step-1").mkdir(parents=True)
        (root / name / "checkpoints" / "step-1" / "state.pt").write_bytes(b"state")


def among(*deleted: str) -> Callable[[Mapping[str, LocalRun]], set[str]]:
    return lambda names: set(names) & set(deleted)


def remove_deleted(root: Path, deleted: Callable[[Mapping[str, LocalRun]], set[str]], *, max_seconds: float) -> bool:
    return remove_run_dirs(root, run_dirs_of(root, deleted), max_seconds=max_seconds)


def names(root: Path) -> list[str]:
    return sorted(entry.name for entry in root.iterdir())


def test_only_those_of_deleted_jobs_go(tmp_path: Path) -> None:
    root = tmp_path / "runs"
    assert remove_deleted(root, among(), max_seconds=60), "no job ran here yet"
    make(root, "deleted", "unknown", "running")
    (root / "deleted-file").write_text("")
    make(tmp_path, "elsewhere")
    (root / "deleted-link").symlink_to(tmp_path / "elsewhere")
    assert remove_deleted(root, among("deleted", "deleted-file", "deleted-link"), max_seconds=60)
    assert names(root) == ["deleted-file", "deleted-link", "running", "unknown"]
    assert (tmp_path / "elsewhere" / "checkpoints").exists()


def test_many_are_asked_about_in_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_dirs, "BATCH_SIZE", 2)
    make(tmp_path, "a", "b", "c", "d", "e")
    asked: list[list[str]] = []

    def deleted(runs: Mapping[str, LocalRun]) -> set[str]:
        asked.append(list(runs))
        return {"b", "e"} & set(runs)

    assert remove_deleted(tmp_path, deleted, max_seconds=60)
    assert asked == [["a", "b"], ["c", "d"], ["e"]]
    assert names(tmp_path) == ["a", "c", "d"]


def test_none_is_begun_when_the_time_is_over_and_the_next_call_goes_on(tmp_path: Path) -> None:
    make(tmp_path, "a", "b")
    assert not remove_deleted(tmp_path, among("a", "b"), max_seconds=-1)
    assert names(tmp_path) == ["a", "b"]
    assert remove_deleted(tmp_path, among("a", "b"), max_seconds=60)
    assert names(tmp_path) == []


def test_one_in_use_stays_until_the_last_user_is_gone(tmp_path: Path) -> None:
    with in_use(tmp_path / "a", 1):
        with in_use(tmp_path / "a", 1):
            remove_deleted(tmp_path, among("a"), max_seconds=60)
        remove_deleted(tmp_path, among("a"), max_seconds=60)
        assert names(tmp_path) == ["a"]
    remove_deleted(tmp_path, among("a"), max_seconds=60)
    assert names(tmp_path) == []


def test_a_killed_user_does_not_keep_it(tmp_path: Path) -> None:
    held = f"in_use(Path({str(tmp_path / 'a')!r}), 1)"
    code = f"from pathlib import Path; from worker.run_dirs import in_use\nwith {held}: print(flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as user:
        assert user.stdout is not None
        assert user.stdout.readline() == b"\n"
        remove_deleted(tmp_path, among("a"), max_seconds=60)
        assert names(tmp_path) == ["a"]
        user.kill()
    remove_deleted(tmp_path, among("a"), max_seconds=60)
    assert names(tmp_path) == []


def test_one_that_can_not_be_removed_is_logged_and_does_not_keep_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    make(tmp_path, "a", "b")
    remove = run_dirs.shutil.rmtree

    def failing(path: Path) -> None:
        if path.name.startswith(".removing-a-"):
            raise PermissionError(13, "not yours")
        remove(path)

    monkeypatch.setattr(run_dirs.shutil, "rmtree", failing)
    with caplog.at_level(logging.ERROR):
        assert remove_deleted(tmp_path, among("a", "b"), max_seconds=60)
    (left,) = names(tmp_path)
    assert left.startswith(".removing-a-")
    assert "run directory a, which nothing needs, could not be removed" in caplog.text
    monkeypatch.undo()
    remove_deleted(tmp_path, among(), max_seconds=60)
    assert names(tmp_path) == [], "it is known by its name"


def test_what_a_machine_knows_of_its_run_directories(tmp_path: Path) -> None:
    seen: dict[str, LocalRun] = {}

    def look(runs: Mapping[str, LocalRun]) -> set[str]:
        seen.update(runs)
        return set()

    for attempt in (3, 2):  # an attempt that lost its lease may come later
        with in_use(tmp_path / "a", attempt):
            save(tmp_path / "a", 5 * attempt)
    make(tmp_path, "old")
    run_dirs_of(tmp_path, look)
    assert seen == {"a": LocalRun(attempt=3, step=15), "old": LocalRun(attempt=None, step=0)}


def test_a_directory_that_is_removed_while_an_attempt_starts_is_made_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path, "a")
    flock, was_removed = fcntl.flock, list[bool]()

    def remove_and_lock(descriptor: int, operation: int) -> None:
        if not was_removed:
            was_removed.append(True)
            remove_deleted(tmp_path, among("a"), max_seconds=60)
        flock(descriptor, operation)

    monkeypatch.setattr(run_dirs.fcntl, "flock", remove_and_lock)
    with in_use(tmp_path / "a", 2):
        assert not (tmp_path / "a" / "checkpoints").exists()
        remove_deleted(tmp_path, among("a"), max_seconds=60)
        assert names(tmp_path) == ["a"]
