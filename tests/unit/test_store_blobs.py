"""The blob store."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from service.store.blobs import TEMPORARY_SUFFIX, BlobsRefusedError, BlobStore, new_key


def files_under(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def test_bytes_come_back_as_they_went_in(tmp_path: Path) -> None:
    content = bytes(range(256)) * 10_000  # more than one chunk
    (tmp_path / "source").write_bytes(content)
    store = BlobStore(tmp_path / "store")
    stored = store.put_file(tmp_path / "source")
    assert (stored.num_bytes, stored.sha256) == (len(content), hashlib.sha256(content).hexdigest())
    assert b"".join(store.stream(stored.key)) == content
    assert b"".join(store.stream(stored.key, 100, 2_000_000)) == content[100:2_000_100]
    assert store.num_bytes(stored.key) == len(content)
    assert store.put_file(tmp_path / "source").key != stored.key
    store.delete(stored.key)
    store.delete(stored.key)
    assert not store.path(stored.key).exists()


def with_folder_for_a_key(folder: Path) -> tuple[BlobStore, str]:
    """So that the file that is copied is all that is synced before the end."""
    store, key = BlobStore(folder / "store"), new_key()
    store.path(key).parent.mkdir(parents=True)
    return store, key


def test_a_copy_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "source").write_bytes(b"x")
    store, key = with_folder_for_a_key(tmp_path)

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        store.put_file(tmp_path / "source", key)
    assert files_under(tmp_path / "store") == []


def test_a_copy_that_does_not_read_back_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "source").write_bytes(b"weights")
    store, key = with_folder_for_a_key(tmp_path)

    def flip(descriptor: int) -> None:
        os.pwrite(descriptor, b"W", 0)

    monkeypatch.setattr("os.fsync", flip)
    with pytest.raises(OSError, match="does not read back"):
        store.put_file(tmp_path / "source", key)
    assert files_under(tmp_path / "store") == []


def test_deleting_takes_what_a_killed_upload_left(tmp_path: Path) -> None:
    store, key = BlobStore(tmp_path), new_key()
    store.path(key).parent.mkdir()
    store.path(key).with_suffix(TEMPORARY_SUFFIX).write_bytes(b"half")
    store.delete(key)
    assert files_under(tmp_path) == []


def test_the_last_deletion_takes_the_folder_along(tmp_path: Path) -> None:
    (tmp_path / "source").write_bytes(b"x")
    store, first, second = BlobStore(tmp_path / "store"), "ab/" + "0" * 32, "ab/" + "1" * 32
    for key in (first, second):
        store.put_file(tmp_path / "source", key)
    store.delete(first)
    assert store.num_bytes(second) == 1
    store.delete(second)
    store.delete(second)
    assert list((tmp_path / "store").iterdir()) == []


def test_a_folder_that_a_deletion_takes_away_while_it_is_needed_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "source").write_bytes(b"x")
    store, key = BlobStore(tmp_path / "store"), new_key()
    emptied: list[Path] = []

    def deleting(folder: Path) -> None:
        if not emptied:  # the folder has just been made
            store.delete(f"{key[:3]}{'0' * 32}")
            emptied.append(folder)
            assert not store.path(key).parent.exists()

    monkeypatch.setattr("service.store.blobs.sync_directory", deleting)
    assert store.put_file(tmp_path / "source", key).num_bytes == 1
    assert emptied == [store.root]
    assert store.num_bytes(key) == 1


def test_writers_and_deleters_of_one_folder_do_not_disturb_each_other(tmp_path: Path) -> None:
    (tmp_path / "source").write_bytes(b"x")
    store = BlobStore(tmp_path / "store")

    def come_and_go(number: int) -> None:
        for turn in range(50):
            key = f"ab/{number:016x}{turn:016x}"
            store.put_file(tmp_path / "source", key)
            assert store.num_bytes(key) == 1
            store.delete(key)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(come_and_go, range(4)))
    assert list(store.root.iterdir()) == []


@contextmanager
def as_somebody_without_rights() -> Iterator[None]:
    """Root may write everywhere, so it is nobody meanwhile."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(65_534)
    try:
        yield
    finally:
        os.seteuid(user)


@pytest.fixture
def unwritable() -> Iterator[Path]:
    """A folder with a source and a store that holds a file, which others than root may only look at."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "source").write_bytes(b"x")
        BlobStore(folder / "store").put_file(folder / "source", "ab/" + "0" * 32)
        for path in (folder, folder / "store", folder / "store" / "ab"):
            path.chmod(0o555)
        (folder / "store" / "ab" / ("0" * 32)).chmod(0)
        yield folder
        for path in (folder, folder / "store", folder / "store" / "ab"):
            path.chmod(0o755)


def test_a_folder_without_rights_refuses_and_says_what_to_do(unwritable: Path) -> None:
    store, here, elsewhere = BlobStore(unwritable / "store"), "ab/" + "0" * 32, "cd/" + "0" * 32
    with as_somebody_without_rights():
        for act in (
            store.check_writable,
            lambda: store.put_file(unwritable / "source"),
            lambda: store.put_file(unwritable / "source", "ab/" + "1" * 32),
            lambda: store.stream(here),
            lambda: store.delete(here),
        ):
            with pytest.raises(BlobsRefusedError, match=rf"Permission denied. Give the user .* right to .* {unwritable}/store and all"):
                act()
        with pytest.raises(FileNotFoundError):
            store.num_bytes(elsewhere)
        with pytest.raises(PermissionError):
            store.put_file(unwritable / "store" / here)  # a source is none of the store's


@pytest.mark.parametrize("key", ["../../etc/passwd", "/etc/passwd", "ab/../cd", "", "ab/" + "g" * 32, "ab/" + "0" * 32 + "\n"])
def test_only_keys_of_its_own_making_are_paths(tmp_path: Path, key: str) -> None:
    with pytest.raises(ValueError, match="no key"):
        BlobStore(tmp_path).path(key)


def test_writability_is_checked_for_real(tmp_path: Path) -> None:
    BlobStore(tmp_path / "new").check_writable()
    assert files_under(tmp_path / "new") == []
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):
        BlobStore(tmp_path / "file").check_writable()
