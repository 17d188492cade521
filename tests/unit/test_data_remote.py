"""Remote shards over HTTP: found, fetched, verified, kept within bounds, shared between processes."""

import gzip
import multiprocessing
import os
import shutil
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from cliprd_core.data import remote, shard_cache
from cliprd_core.data.errors import CorruptSampleError, InvalidDataError
from cliprd_core.data.loader import build_train_loader
from cliprd_core.data.shard_cache import ShardCache
from cliprd_core.data.shard_files import Descriptor, RemoteShard, without_secrets
from cliprd_core.data.sources import PairSource, expand_shards, open_sources
from cliprd_core.run_dir import SHARD_CACHE_BYTES_VARIABLE
from cliprd_core.spec import JobSpec, WebDatasetSource
from tests.data_files import model_input, pair_members, write_tar
from tests.http_server import FileServer, serve

PAIRS_PER_SHARD = 4


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FileServer]:
    """Serves `0.tar` to `3.tar`, four pairs each."""
    monkeypatch.setattr(remote, "PAUSES_SECONDS", (0.0, 0.0, 0.0))
    for number in range(4):
        first = number * PAIRS_PER_SHARD
        write_tar(tmp_path / f"served/{number}.tar", pair_members(range(first, first + PAIRS_PER_SHARD)))
    with serve(tmp_path / "served") as server:
        yield server


def opened(server: FileServer, cache: Path, name: str = "{0..3}.tar", num_samples: int | None = None) -> PairSource:
    return open_sources([WebDatasetSource(type="webdataset", shards=f"{server.url}/{name}", num_samples=num_samples)], cache)


def captions(source: PairSource) -> list[str]:
    return [source.read(index).caption for index in range(len(source))]


def copies(cache: Path) -> list[Path]:
    return sorted((cache / "shards").glob("*.tar"))


def limit_to(monkeypatch: pytest.MonkeyPatch, server: FileServer, num_shards: float) -> int:
    limit = int(num_shards * (server.folder / "0.tar").stat().st_size)
    monkeypatch.setenv(SHARD_CACHE_BYTES_VARIABLE, str(limit))
    return limit


class TestReading:
    def test_pairs_are_those_of_the_files(self, server: FileServer, tmp_path: Path) -> None:
        source = opened(server, tmp_path / "cache")
        local = open_sources([WebDatasetSource(type="webdataset", shards=str(server.folder / "{0..3}.tar"))], tmp_path / "cache")
        assert len(source) == 16
        for index in range(16):
            ours, theirs = source.read(index), local.read(index)
            assert (ours.image_bytes, ours.caption) == (theirs.image_bytes, theirs.caption)
        assert source.read(5).key == f"{server.url}/1.tar:000005"
        assert source.fingerprint == local.fingerprint
        assert [server.num_downloads(f"{number}.tar") for number in range(4)] == [1] * 4

    def test_second_run_knows_the_order_without_downloading(self, server: FileServer, tmp_path: Path) -> None:
        first = opened(server, tmp_path / "cache")
        shutil.rmtree(tmp_path / "cache/shards")
        again = opened(server, tmp_path / "cache")
        assert (len(again), again.fingerprint) == (len(first), first.fingerprint)
        assert not copies(tmp_path / "cache")
        assert again.read(9).caption == "caption 9"
        assert [server.num_downloads(f"{number}.tar") for number in range(4)] == [1, 1, 2, 1]

    def test_shard_that_changed_on_the_server_is_fetched_and_indexed_again(self, server: FileServer, tmp_path: Path) -> None:
        opened(server, tmp_path / "cache")
        write_tar(server.folder / "3.tar", pair_members(range(90, 96)))
        assert captions(opened(server, tmp_path / "cache"))[12:] == [f"caption {number}" for number in range(90, 96)]

    def test_num_samples_leaves_far_shards_alone(self, server: FileServer, tmp_path: Path) -> None:
        pattern = "{0,1,2,3,0,1,2,3,missing}.tar"  # the last is beyond the eight that are looked at together
        assert len(opened(server, tmp_path / "cache", pattern, num_samples=30)) == 30

    def test_loader_processes_fetch_after_the_fork(self, server: FileServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """The cache holds two of four shards, so the processes fetch while they load; the batches are those of one process."""
        limit = limit_to(monkeypatch, server, 2.5)
        spec = JobSpec.model_validate(
            {
                "name": "test",
                "recipe": "clip",
                "student": {"model": "ViT-T-16"},
                "data": {"train": [{"type": "webdataset", "shards": f"{server.url}/{{0..3}}.tar"}]},
                "training": {"global_batch_size": 8, "num_data_workers": 2},
                "resources": {"device": "cpu"},
            }
        )
        found = []
        for num_data_workers in (0, 2):
            one = spec.model_copy(update={"training": spec.training.model_copy(update={"num_data_workers": num_data_workers})})
            source = open_sources(one.data.train, tmp_path / "cache")
            with closing(build_train_loader(one, source, student=model_input())) as loader:
                batches = [batch for epoch in range(2) for batch in loader.epoch(epoch)]
                assert not loader.corrupt_indices
            found.append([(batch.sample_indices.tolist(), batch.student_pixels.sum().item()) for batch in batches])
        assert found[0] == found[1]
        assert sum(copy.stat().st_size for copy in copies(tmp_path / "cache")) <= limit


class TestFaults:
    def test_passing_failures_are_ridden_out(self, server: FileServer, tmp_path: Path) -> None:
        server.failures_left = 3
        assert len(opened(server, tmp_path / "cache", "0.tar")) == PAIRS_PER_SHARD
        assert server.num_downloads("0.tar") == 4

    def test_missing_shard_names_field_and_address_and_is_asked_for_once(self, server: FileServer, tmp_path: Path) -> None:
        with pytest.raises(InvalidDataError, match=r"cannot read shard http.*/9\.tar: .*404.*`shards`"):
            opened(server, tmp_path / "cache", "9.tar")
        assert server.num_asked["HEAD", "/9.tar"] + server.num_asked["GET", "/9.tar"] <= 2

    @pytest.mark.usefixtures("server")
    def test_unreachable_server_names_the_field(self, tmp_path: Path) -> None:
        source = WebDatasetSource(type="webdataset", shards="http://user:secret@127.0.0.1:9/0.tar?token=secret")
        with pytest.raises(InvalidDataError, match=r"cannot read shard http://127\.0\.0\.1:9/0\.tar: .*`shards`") as caught:
            open_sources([source], tmp_path / "cache")
        assert "secret" not in str(caught.value)

    def test_cut_download_is_no_copy(self, server: FileServer, tmp_path: Path) -> None:
        server.cut_at = 3000
        with pytest.raises(InvalidDataError, match="cannot read shard"):
            opened(server, tmp_path / "cache", "0.tar")
        assert server.num_downloads("0.tar") == 4
        assert not copies(tmp_path / "cache")
        assert not list((tmp_path / "cache/shards").glob("*.part"))

    def test_what_cannot_be_fetched_during_the_run_is_corrupt_and_not_tried_for_every_sample(
        self, server: FileServer, tmp_path: Path
    ) -> None:
        source = opened(server, tmp_path / "cache")
        shutil.rmtree(tmp_path / "cache/shards")
        server.failures_left = 1000
        for index in range(PAIRS_PER_SHARD):
            with pytest.raises(CorruptSampleError, match=rf"0\.tar:00000{index}: cannot read it: .*503"):
                source.read(index)
        assert server.num_downloads("0.tar") == 1 + 4

    def test_shard_that_changes_during_the_run_is_not_mistaken(self, server: FileServer, tmp_path: Path) -> None:
        source = opened(server, tmp_path / "cache")
        shutil.rmtree(tmp_path / "cache/shards")
        content = bytearray((server.folder / "0.tar").read_bytes())
        content[700] ^= 1  # same length
        (server.folder / "0.tar").write_bytes(content)
        with pytest.raises(CorruptSampleError, match="changed on the server"):
            source.read(0)

    def test_shard_larger_than_the_cache_is_refused(self, server: FileServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        limit_to(monkeypatch, server, 0.5)
        with pytest.raises(InvalidDataError, match="CLIPRD_SHARD_CACHE_BYTES"):
            opened(server, tmp_path / "cache")

    @pytest.mark.parametrize("value", ["0", "-5", "10GB"])
    def test_limit_that_is_no_number_is_refused(
        self, server: FileServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: str
    ) -> None:
        monkeypatch.setenv(SHARD_CACHE_BYTES_VARIABLE, value)
        with pytest.raises(ValueError, match="CLIPRD_SHARD_CACHE_BYTES is"):
            opened(server, tmp_path / "cache")

    def test_server_that_sends_more_than_it_announced_is_cut_off(self, server: FileServer, tmp_path: Path) -> None:
        url, part = f"{server.url}/0.tar", tmp_path / "part"
        shard = RemoteShard(url, *remote._describe(url), lambda _: Descriptor(part))
        server.sends_before = bytes(50_000_000)
        with pytest.raises(OSError, match="bytes, and more came"):
            remote.download(shard, part)
        assert server.num_downloads("0.tar") == 1 + len(remote.PAUSES_SECONDS)
        assert part.stat().st_size < 1_000_000

    def test_what_a_server_packs_is_not_unpacked_past_the_size_it_announced(self, server: FileServer, tmp_path: Path) -> None:
        packed = gzip.compress(bytes(50_000_000))
        (server.folder / "0.tar").write_bytes(packed)
        server.headers_of_get = {"Content-Encoding": "gzip"}
        url, part = f"{server.url}/0.tar", tmp_path / "part"
        remote.download(RemoteShard(url, *remote._describe(url), lambda _: Descriptor(part)), part)
        assert part.read_bytes() == packed
        assert server.encodings_asked_for == {"identity"}

    def test_copy_cut_short_on_the_disk_is_fetched_again(self, server: FileServer, tmp_path: Path) -> None:
        source = opened(server, tmp_path / "cache", "0.tar")
        (copy,) = copies(tmp_path / "cache")
        os.truncate(copy, 1000)
        assert captions(source) == [f"caption {number}" for number in range(PAIRS_PER_SHARD)]
        assert server.num_downloads("0.tar") == 2


def read_pairs(url: str, cache: str, indices: list[int]) -> list[str]:
    source = open_sources([WebDatasetSource(type="webdataset", shards=url)], Path(cache))
    return [source.read(index).caption for index in indices]


class TestBounds:
    def test_copy_used_longest_ago_goes_first(
        self, server: FileServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        limit_to(monkeypatch, server, 2.5)
        source = opened(server, tmp_path / "cache")
        assert "fetched over and over" in caplog.text
        server.num_asked.clear()
        for index in (0, 4, 0, 8, 0, 8):  # shards 0, 1, 0, 2: shard 1 makes room
            source.read(index)
        downloads = [server.num_downloads(f"{number}.tar") for number in range(3)]
        source.read(0)
        source.read(8)
        assert [server.num_downloads(f"{number}.tar") for number in range(3)] == downloads
        source.read(4)
        assert server.num_downloads("1.tar") == downloads[1] + 1
        assert len(copies(tmp_path / "cache")) == 2

    def test_copy_in_use_is_not_evicted(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(shard_cache, "MAX_WAIT_FOR_ROOM_SECONDS", 0.2)
        cache = ShardCache(tmp_path, 2500, lambda shard, target: target.write_bytes(bytes(shard.num_bytes)) and None)
        first, second, third = (RemoteShard(f"http://host/{number}.tar", 1000, "", cache.fetch) for number in range(3))
        held: list[Descriptor] = [first.open(), second.open()]
        with pytest.raises(OSError, match="full of shards in use"):
            third.open()
        assert held[0].read(0, 1000) == bytes(1000)
        held.pop(0)
        cache._failures.clear()  # the pause before it is tried again
        third.open()
        assert sorted(copy.name for copy in tmp_path.glob("*.tar")) == sorted(one.open().path.name for one in (second, third))

    def test_download_left_by_a_dead_process_takes_no_room(self, tmp_path: Path) -> None:
        cache = ShardCache(tmp_path, 1500, lambda shard, target: target.write_bytes(bytes(shard.num_bytes)) and None)
        (tmp_path / "dead.1000.part").write_bytes(b"half")
        (tmp_path / "dead.lock").touch()
        RemoteShard("http://host/0.tar", 1000, "", cache.fetch).open()
        assert not list(tmp_path.glob("*.part"))

    def test_several_processes_download_a_shard_once(self, server: FileServer, tmp_path: Path) -> None:
        server.answers_get_after_seconds = 0.2
        url = f"{server.url}/{{0..3}}.tar"
        with multiprocessing.get_context("spawn").Pool(3) as pool:
            found = pool.starmap(read_pairs, [(url, str(tmp_path / "cache"), list(range(16)))] * 3)
        assert found == [[f"caption {number}" for number in range(16)]] * 3
        assert [server.num_downloads(f"{number}.tar") for number in range(4)] == [1] * 4


def test_names_show_no_secrets() -> None:
    assert without_secrets("https://me:pass@host:8/a/b.tar?Signature=x") == "https://host:8/a/b.tar"
    assert without_secrets("s3://bucket/a@b/{0..3}.tar") == "s3://bucket/a@b/{0..3}.tar"


def test_braces_of_addresses_are_expanded_and_globs_left_to_s3(tmp_path: Path) -> None:
    assert list(expand_shards("https://host/{00..02}.tar?a=1")) == [f"https://host/0{number}.tar?a=1" for number in range(3)]
