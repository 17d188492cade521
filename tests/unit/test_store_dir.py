"""Teacher stores as folders: keys, making, locks, lists, deletion, eviction, and what crashes leave behind."""

from __future__ import annotations

import fcntl
import os
import shutil
import threading
import time
from pathlib import Path

import pytest

from cliprd_core import store_dir, store_removal
from cliprd_core.store_dir import (
    FILES,
    IMAGES_FILE,
    LOCK_FILE,
    StoreInUseError,
    StoreMeta,
    StoreNotFoundError,
    add_usage,
    create_store,
    is_whole,
    lock_shared,
)
from cliprd_core.store_removal import delete_store, evict, list_stores
from tests.teacher_store_helpers import make_key, make_store

CHANGES = [
    {"teacher_sha256": "00" * 32},
    {"teacher_config": {"embed_dim": 8, "vision_cfg": {"image_size": 33}}},
    {"data_fingerprint": "00" * 32},
    {"num_samples": 13},
    {"transform": {"image_size": 32, "mean": [0.5, 0.5, 0.6]}},
    {"crop_scale": (0.8, 1.0)},
    {"num_views": 3},
    {"seed": 1},
    {"precision": "bf16"},
    {"width": 9},
    {"dtype": "bfloat16"},
]


def fill(root: Path, digest: str, num_bytes: int) -> None:
    """Take so many bytes on disk."""
    with (root / digest / IMAGES_FILE).open("r+b") as file:
        file.write(b"x" * num_bytes)


def test_every_part_of_a_key_and_the_format_tell_stores_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    digests = {make_key(**changes).digest for changes in [{}, *CHANGES]}
    monkeypatch.setattr(store_dir, "FORMAT_VERSION", 2)
    digests.add(make_key().digest)
    assert len(digests) == len(CHANGES) + 2
    assert {name for changes in CHANGES for name in changes} == set(make_key().model_fields_set) | {"dtype"}


def test_the_order_of_a_keys_objects_does_not_matter() -> None:
    swapped = make_key(transform={"mean": [0.5, 0.5, 0.5], "image_size": 32})
    assert swapped.digest == make_key().digest


def test_a_new_store_is_whole_sparse_and_described(tmp_path: Path) -> None:
    key = make_key(num_samples=100_000, width=512)
    create_store(tmp_path, key, teacher="ViT-B-16", data="cc3m")
    folder = tmp_path / key.digest
    assert is_whole(folder, key)
    assert {file.name for file in folder.iterdir()} == set(FILES)
    meta = StoreMeta.model_validate_json((folder / "meta.json").read_bytes())
    assert (meta.key, meta.teacher, meta.data) == (key, "ViT-B-16", "cc3m")
    (record,) = list_stores(tmp_path)
    assert record.num_bytes > 3 * 100_000 * 512 * 2
    assert record.num_bytes_on_disk < 2_000_000
    assert [path.name for path in tmp_path.iterdir()] == [key.digest]


def test_making_a_store_that_is_there_changes_nothing(tmp_path: Path) -> None:
    digest = make_store(tmp_path)
    fill(tmp_path, digest, 10)
    make_store(tmp_path)
    assert (tmp_path / digest / IMAGES_FILE).read_bytes().startswith(b"x" * 10)
    assert [path.name for path in tmp_path.iterdir()] == [digest]


def test_a_store_that_can_not_be_made_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def is_full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", is_full)
    with pytest.raises(OSError, match="No space left"):
        make_store(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_store_in_use_is_not_deleted_until_its_last_user_lets_go(tmp_path: Path) -> None:
    digest = make_store(tmp_path)
    locks = [lock_shared(tmp_path / digest) for _ in range(2)]
    for lock in locks:
        assert lock is not None
        assert list_stores(tmp_path)[0].in_use
        with pytest.raises(StoreInUseError, match="cancel"):
            delete_store(tmp_path, digest)
        assert list_stores(tmp_path)[0].key == digest
        os.close(lock)
    assert not list_stores(tmp_path)[0].in_use
    delete_store(tmp_path, digest)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("digest", ["0" * 32, "..", "../outside", "", ".deleted-1"])
def test_what_is_no_store_is_not_deleted(tmp_path: Path, digest: str) -> None:
    root = tmp_path / "root"
    root.mkdir()
    (tmp_path / "outside").mkdir()
    with pytest.raises(StoreNotFoundError):
        delete_store(root, digest)
    assert (tmp_path / "outside").is_dir()


def test_a_deletion_that_breaks_off_leaves_no_store_and_the_rest_is_swept_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    digest = make_store(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", lambda *_, **__: None)
        delete_store(tmp_path, digest)
    assert list_stores(tmp_path) == []
    assert lock_shared(tmp_path / digest) is None
    assert len(list(tmp_path.iterdir())) == 1
    assert evict(tmp_path, 10**9) == []
    assert list(tmp_path.iterdir()) == []


def test_half_made_stores_are_swept_up_once_their_maker_must_be_gone(tmp_path: Path) -> None:
    fresh, old = tmp_path / ".creating-1", tmp_path / ".creating-2"
    for folder in (fresh, old):
        folder.mkdir()
        (folder / IMAGES_FILE).touch()
    long_ago = time.time() - 2 * store_removal.ABANDONED_SECONDS
    os.utime(old, (long_ago, long_ago))
    evict(tmp_path, 10**9)
    assert list(tmp_path.iterdir()) == [fresh]


def test_eviction_takes_the_longest_unused_first_and_none_in_use(tmp_path: Path) -> None:
    digests = []
    for seed in range(5):
        digests.append(make_store(tmp_path, seed=seed, width=512))
        fill(tmp_path, digests[-1], 12 * 2 * 512 * 2)
    add_usage(tmp_path / digests[0], hits=1, misses=0, filled=(0, 0))  # so it is the most recently used
    size = list_stores(tmp_path)[0].num_bytes_on_disk
    locks = [lock_shared(tmp_path / digests[number]) for number in (1, 2)]
    evicted = evict(tmp_path, 3 * size)
    for lock in locks:
        assert lock is not None
        os.close(lock)
    assert [record.key for record in evicted] == [digests[3], digests[4]]
    assert {record.key for record in list_stores(tmp_path)} == {digests[0], digests[1], digests[2]}


def test_a_store_that_is_opened_while_others_evict_stays_until_it_is_closed(tmp_path: Path) -> None:
    key = make_key()
    folder = tmp_path / key.digest
    num_evicted, num_held, is_over = 0, 0, threading.Event()

    def evict_all() -> None:
        nonlocal num_evicted
        while not is_over.is_set():
            num_evicted += len(evict(tmp_path, 0))

    evicting = threading.Thread(target=evict_all)
    evicting.start()
    try:
        deadline = time.monotonic() + 200
        while min(num_evicted, num_held) < 20 and time.monotonic() < deadline:
            create_store(tmp_path, key, teacher="", data="")
            lock = lock_shared(folder)
            if lock is None:
                continue  # it went before it was opened, and is made anew
            for _ in range(10):
                assert (folder / LOCK_FILE).stat().st_ino == os.fstat(lock).st_ino
            num_held += 1
            os.close(lock)
    finally:
        is_over.set()
        evicting.join()
    assert min(num_evicted, num_held) >= 20


def test_eviction_that_can_not_reach_its_limit_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    lock = lock_shared(tmp_path / make_store(tmp_path))
    assert lock is not None
    assert evict(tmp_path, 0) == []
    os.close(lock)
    assert "more than the limit of 0" in caplog.text


def test_a_root_that_is_not_there_has_no_stores(tmp_path: Path) -> None:
    assert list_stores(tmp_path / "none") == []
    assert evict(tmp_path / "none", 0) == []


def test_a_store_whose_description_is_damaged_is_listed_and_can_be_deleted(tmp_path: Path) -> None:
    digest = make_store(tmp_path)
    for name in ("meta.json", "usage.json"):
        (tmp_path / digest / name).write_text("{")
    (tmp_path / digest / "lock").unlink()
    (record,) = list_stores(tmp_path)
    assert (record.key, record.meta, record.in_use) == (digest, None, False)
    assert [one.key for one in evict(tmp_path, 0)] == [digest]


def test_usage_adds_up_and_never_waits_unless_told(tmp_path: Path) -> None:
    folder = tmp_path / make_store(tmp_path)
    assert add_usage(folder, hits=3, misses=1, filled=(2, 1))
    assert add_usage(folder, hits=4, misses=0, filled=(5, 3))
    usage = list_stores(tmp_path)[0].usage
    assert (usage.hits, usage.misses, usage.num_images, usage.num_texts) == (7, 1, 5, 3)
    assert time.time() - usage.last_used < 60
    with (folder / "usage.lock").open("ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert not add_usage(folder, hits=1, misses=0, filled=(5, 3))
    assert add_usage(folder, hits=1, misses=0, filled=(5, 3), wait=True)
    assert list_stores(tmp_path)[0].usage.hits == 8
