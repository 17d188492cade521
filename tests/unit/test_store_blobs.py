"""The blob store."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from service.store.blobs import TEMPORARY_SUFFIX, BlobStore, new_key


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


def test_a_copy_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "source").write_bytes(b"x")
    store = BlobStore(tmp_path / "store")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        store.put_file(tmp_path / "source")
    assert files_under(tmp_path / "store") == []


def test_a_copy_that_does_not_read_back_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "source").write_bytes(b"weights")
    store = BlobStore(tmp_path / "store")

    def flip(descriptor: int) -> None:
        os.pwrite(descriptor, b"W", 0)

    monkeypatch.setattr("os.fsync", flip)
    with pytest.raises(OSError, match="does not read back"):
        store.put_file(tmp_path / "source")
    assert files_under(tmp_path / "store") == []


def test_deleting_takes_what_a_killed_upload_left(tmp_path: Path) -> None:
    store, key = BlobStore(tmp_path), new_key()
    store.path(key).parent.mkdir()
    store.path(key).with_suffix(TEMPORARY_SUFFIX).write_bytes(b"half")
    store.delete(key)
    assert files_under(tmp_path) == []


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
