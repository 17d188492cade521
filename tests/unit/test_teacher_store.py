"""The teacher store's rows: what is written is read, and what is damaged, half written or absent is never taken for a feature."""

from __future__ import annotations

import logging
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cliprd_core import store_rows
from cliprd_core.store_dir import (
    IMAGE_CHECKSUMS_FILE,
    IMAGES_FILE,
    TEXTS_FILE,
    StoreInUseError,
    StoreKey,
)
from cliprd_core.store_removal import delete_store, list_stores
from cliprd_core.teacher_store import TeacherStore, open_store
from tests.live import eventually
from tests.teacher_store_helpers import make_key

FILL = """
import sys, time
from pathlib import Path
import torch
from cliprd_core.teacher_store import open_store
from tests.teacher_store_helpers import make_key

root, noise, pause = Path(sys.argv[1]), float(sys.argv[2]), float(sys.argv[3])
key = make_key(num_samples=400, width=64)
with open_store(root, key, teacher="t", data="d") as store:
    print("open", flush=True)
    sys.stdin.readline()
    for start in range(0, 400, 8):
        indices = torch.arange(start, start + 8)
        features = torch.sin(indices[:, None] * torch.arange(1.0, 65.0)) + noise
        for view in range(2):
            store.write_images(indices, view, store.rounded(features))
        store.write_texts(indices, store.rounded(features))
        time.sleep(pause)
        if pause and start == 200:
            sys.stdin.readline()  # for whoever is to kill it, and may be late
"""


def open_(root: Path, key: StoreKey | None = None) -> TeacherStore:
    return open_store(root, key or make_key(), teacher="ViT-B-16", data="shards")


@pytest.fixture
def store(tmp_path: Path) -> Iterator[TeacherStore]:
    with open_(tmp_path) as store:
        yield store


def features(store: TeacherStore, num_rows: int, seed: int = 0) -> Tensor:
    return store.rounded(torch.randn(num_rows, store.key.width, generator=torch.Generator().manual_seed(seed)))


def start_filling(root: Path, *, noise: float = 0.0, pause: float = 0.0) -> subprocess.Popen[str]:
    """A process that has opened the store and fills it once it is told to."""
    command = [sys.executable, "-c", FILL, str(root), str(noise), str(pause)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)


def go(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()


def wait_until_open(process: subprocess.Popen[str]) -> None:
    assert process.stdout is not None
    assert process.stdout.readline() == "open\n"


def filled_features(noise: float) -> Tensor:
    rows = torch.sin(torch.arange(400)[:, None] * torch.arange(1.0, 65.0)) + noise
    return torch.nn.functional.normalize(rows, dim=-1).half()


def flip_bit(path: Path, offset: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        (byte,) = file.read(1)
        file.seek(offset)
        file.write(bytes([byte ^ 4]))


def test_a_new_store_has_nothing(store: TeacherStore) -> None:
    rows, present = store.read_images(np.arange(12), 1)
    assert (rows.shape, rows.dtype) == ((12, 8), torch.float16)
    assert not rows.any()
    assert not present.any()
    assert store.num_filled() == (0, 0)
    assert not store.is_complete()


@settings(max_examples=60, deadline=None)
@given(
    dtype=st.sampled_from(["float16", "bfloat16"]),
    writes=st.lists(st.tuples(st.integers(-1, 1), st.lists(st.integers(0, 11), unique=True), st.integers(0, 9)), max_size=6),
    asked=st.lists(st.integers(0, 11), max_size=15),
)
def test_what_was_written_last_is_read_back_bit_for_bit(
    tmp_path_factory: pytest.TempPathFactory, dtype: str, writes: list[tuple[int, list[int], int]], asked: list[int]
) -> None:
    """View -1 stands for captions."""
    expected: dict[tuple[int, int], Tensor] = {}
    with open_(tmp_path_factory.mktemp("root"), make_key(dtype=dtype)) as store:
        for view, indices, seed in writes:
            rows = features(store, len(indices), seed)
            positions = np.array(indices, dtype=np.int64)
            if view < 0:
                store.write_texts(positions, rows)
            else:
                store.write_images(torch.from_numpy(positions), view, rows)
            expected |= {(view, index): row for index, row in zip(indices, rows, strict=True)}
        for view in (-1, 0, 1):
            positions = np.array(asked, dtype=np.int64)
            read, present = store.read_texts(positions) if view < 0 else store.read_images(positions, view)
            assert present.tolist() == [(view, index) in expected for index in asked]
            for index, row in zip(asked, read, strict=True):
                wanted = expected.get((view, index), torch.zeros_like(row))
                assert torch.equal(row.view(torch.int16), wanted.view(torch.int16))
        assert store.num_filled() == (sum(view >= 0 for view, _ in expected), sum(view < 0 for view, _ in expected))


def test_rounded_is_what_is_read_back_and_rounding_again_in_the_file_changes_nothing(tmp_path: Path) -> None:
    raw = 1e6 * torch.randn(12, 8)  # as raw features, float16 would overflow
    with open_(tmp_path) as store:
        rows = store.rounded(raw)
        store.write_texts(np.arange(12), rows)
    assert torch.allclose(rows.float(), torch.nn.functional.normalize(raw, dim=-1), atol=5e-4)
    with open_(tmp_path) as store:
        read, present = store.read_texts(np.arange(12))
    assert present.all()
    assert torch.equal(read, rows)


def test_rows_that_are_not_finite_are_never_kept(store: TeacherStore) -> None:
    raw = torch.randn(12, 8)
    raw[3, 2] = float("nan")
    raw[5, 0] = float("inf")
    store.write_texts(np.arange(12), store.rounded(raw))
    assert store.read_texts(np.arange(12))[1].tolist() == [index not in (3, 5) for index in range(12)]


def test_features_of_another_dtype_are_refused(store: TeacherStore) -> None:
    with pytest.raises(ValueError, match="as `rounded` returns them"):
        store.write_texts(np.arange(2), torch.zeros(2, 8))


@pytest.mark.parametrize("index", [-1, 12])
def test_a_pair_beyond_the_data_is_a_fault_and_not_another_views_row(store: TeacherStore, index: int) -> None:
    with pytest.raises(AssertionError, match="no such pair"):
        store.read_images(np.array([index]), 0)
    with pytest.raises(AssertionError, match="no such pair"):
        store.write_images(np.array([index]), 0, features(store, 1))
    with pytest.raises(AssertionError, match="no view 2"):
        store.read_images(np.array([0]), 2)


@settings(max_examples=40, deadline=None)
@given(row=st.integers(0, 23), byte=st.integers(0, 15))
def test_a_flipped_bit_is_found_and_cleared_and_the_row_can_be_written_again(
    tmp_path_factory: pytest.TempPathFactory, row: int, byte: int
) -> None:
    root = tmp_path_factory.mktemp("root")
    view, index = divmod(row, 12)
    with open_(root) as store:
        rows = features(store, 12)
        for one in range(2):
            store.write_images(np.arange(12), one, rows)
        flip_bit(root / store.key.digest / IMAGES_FILE, row * 16 + byte)
        read, present = store.read_images(np.arange(12), view)
        assert present.tolist() == [one != index for one in range(12)]
        assert not read[index].any()
        assert store.read_images(np.arange(12), 1 - view)[1].all()
        assert (store.verify(), store.num_filled()) == (1, (23, 0))
        store.write_images(np.array([index]), view, rows[index : index + 1])
        assert torch.equal(store.read_images(np.arange(12), view)[0], rows)
        assert store.verify() == 0


def test_a_row_whose_crc_is_0_is_kept_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_rows.zlib, "crc32", lambda _: 0)
    with open_(tmp_path) as store:
        store.write_texts(np.arange(3), features(store, 3))
        assert store.read_texts(np.arange(4))[1].tolist() == [True, True, True, False]


def test_completeness_is_known_and_found_again_after_a_reopening(tmp_path: Path) -> None:
    with open_(tmp_path) as store:
        store.write_texts(np.arange(12), features(store, 12))
        for view, end in ((1, 12), (0, 11)):
            store.write_images(np.arange(end), view, features(store, end))
            assert not store.is_complete()
        store.write_images(np.array([11]), 0, features(store, 1))
        assert store.is_complete()
        flip_bit(tmp_path / store.key.digest / TEXTS_FILE, 0)
        store.verify()
        assert not store.is_complete()
        store.write_texts(np.array([0]), features(store, 1))
    with open_(tmp_path) as store:
        assert store.is_complete()


def test_a_full_disk_ends_the_filling_with_one_warning_and_training_goes_on(
    store: TeacherStore, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """RLIMIT_FSIZE stops pwrite in the middle of a row, as a full disk does. With a mapped write this would be the end of the process."""
    rows = features(store, 12)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (12 * 16 + 5 * 16 + 7, hard))  # view 0, five rows of view 1, and a bit of the next
    try:
        store.write_images(np.arange(12), 0, rows)
        with caplog.at_level(logging.WARNING):
            store.write_images(np.arange(12), 1, rows)
            store.write_texts(np.arange(12), rows)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "training goes on without" in caplog.text
    assert not store.is_writable
    assert store.read_images(np.arange(12), 0)[1].all()
    assert not store.read_images(np.arange(12), 1)[1].any()  # checksums come after all rows
    assert not store.read_texts(np.arange(12))[1].any()


def test_a_run_that_is_killed_while_filling_leaves_only_whole_rows(tmp_path: Path) -> None:
    process = start_filling(tmp_path, pause=0.02)
    wait_until_open(process)
    go(process)
    key = make_key(num_samples=400, width=64)
    with open_(tmp_path, key) as store:
        eventually(lambda: store.num_filled()[0] >= 100 or None)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        rows, present = store.read_images(np.arange(400), 0)
        assert 0 < present.sum() < 400
        assert torch.allclose(rows[present].float(), filled_features(0.0)[present].float(), atol=1e-3)
        assert store.verify() == 0
    delete_store(tmp_path, key.digest)  # its lock went with it


def test_two_runs_that_make_and_fill_one_store_at_once_with_different_numbers_never_mix_them(tmp_path: Path) -> None:
    """Each writes its own numbers into the same rows; a row that is read is the one's or the other's, to the bit."""
    processes = [start_filling(tmp_path, noise=noise) for noise in (0.0, 0.5)]
    for process in processes:
        wait_until_open(process)
    for process in processes:
        go(process)
    for process in processes:
        process.communicate()
        assert process.returncode == 0
    versions = [filled_features(noise) for noise in (0.0, 0.5)]
    with open_(tmp_path, make_key(num_samples=400, width=64)) as store:
        for view in range(2):
            rows, present = store.read_images(np.arange(400), view)
            near = [(rows.float() - version.float()).abs().amax(dim=-1) < 1e-3 for version in versions]
            assert (near[0] | near[1])[present].all()
            assert present.any()
            absent = np.flatnonzero(~present)
            store.write_images(absent, view, versions[0][absent])  # as the next run will
            assert store.read_images(np.arange(400), view)[1].all()
    assert len(list_stores(tmp_path)) == 1


def test_a_torn_write_is_never_read(store: TeacherStore, tmp_path: Path) -> None:
    """Two writers interleaved in the worst way: the second's row under the first's checksum."""
    folder = tmp_path / store.key.digest
    first, second = features(store, 1, seed=1), features(store, 1, seed=2)
    store.write_images(np.array([4]), 0, first)
    with (folder / IMAGES_FILE).open("r+b") as file:
        file.seek(4 * 16)
        file.write(second.view(torch.int16).numpy().tobytes())
    assert not store.read_images(np.array([4]), 0)[1].any()
    with (folder / IMAGE_CHECKSUMS_FILE).open("r+b") as file:  # a checksum without its row, as after a power cut
        file.seek(7 * 4)
        file.write(b"\1\2\3\4")
    assert not store.read_images(np.array([7]), 0)[1].any()


@pytest.mark.parametrize("damage", ["truncate", "meta", "missing", "lock"])
def test_a_damaged_store_is_started_anew(tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture) -> None:
    key = make_key()
    folder = tmp_path / key.digest
    with open_(tmp_path) as store:
        store.write_texts(np.arange(12), features(store, 12))
    match damage:
        case "truncate":
            os.truncate(folder / IMAGES_FILE, 100)
        case "meta":
            (folder / "meta.json").write_text("{")
        case "missing":
            (folder / TEXTS_FILE).unlink()
        case _:
            (folder / "lock").unlink()
    with open_(tmp_path) as store:
        assert store.num_filled() == (0, 0)
    assert "started anew" in caplog.text


def test_a_damaged_store_that_another_run_uses_is_left_alone(store: TeacherStore, tmp_path: Path) -> None:
    (tmp_path / store.key.digest / "meta.json").write_text("{")
    with pytest.raises(StoreInUseError):
        open_(tmp_path)


def test_an_open_store_is_in_use_and_counts_what_it_gave(tmp_path: Path) -> None:
    with open_(tmp_path) as store:
        store.write_texts(np.arange(9), features(store, 9))
        store.read_texts(np.arange(12))
        with pytest.raises(StoreInUseError):
            delete_store(tmp_path, store.key.digest)
    usage = list_stores(tmp_path)[0].usage
    assert (usage.hits, usage.misses, usage.num_images, usage.num_texts) == (9, 3, 0, 9)
    delete_store(tmp_path, store.key.digest)


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_forked_loader_processes_read_write_and_count_for_themselves(tmp_path: Path) -> None:
    """The child counts its own reads only, and holds the store for as long as it lives."""
    key = make_key()
    store = open_(tmp_path)
    store.write_texts(np.arange(12), features(store, 12))
    store.read_texts(np.arange(4))
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()

    def child() -> None:
        theirs.send(store.read_texts(np.arange(12))[1].sum().item())
        store.write_images(np.arange(12), 0, features(store, 12))
        theirs.recv()
        store.close()

    process = context.Process(target=child)
    process.start()
    assert ours.recv() == 12
    store.close()
    with pytest.raises(StoreInUseError):
        delete_store(tmp_path, key.digest)
    ours.send("end")
    process.join()
    assert process.exitcode == 0
    usage = list_stores(tmp_path)[0].usage
    assert (usage.hits, usage.num_images, usage.num_texts) == (16, 12, 12)
    delete_store(tmp_path, key.digest)


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_loader_process_that_ends_without_closing_the_store_leaves_its_counts(tmp_path: Path) -> None:
    with open_(tmp_path) as store:
        store.write_texts(torch.arange(12), features(store, 12))
        loader = multiprocessing.get_context("fork").Process(target=store.read_texts, args=(np.arange(12),))
        loader.start()
        loader.join(120)
        assert loader.exitcode == 0
    assert list_stores(tmp_path)[0].usage.hits == 12
