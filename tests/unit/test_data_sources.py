"""Tar shards, their index, tables, and joining them."""

import gzip
import logging
import os
import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from cliprd_core.data.errors import CorruptSampleError, InvalidDataError
from cliprd_core.data.shard_index import load_shard_index
from cliprd_core.data.sources import JoinedPairs, PairSource, expand_shards, open_sources
from cliprd_core.data.string_table import StringTable
from cliprd_core.spec import CsvSource, WebDatasetSource
from tests.data_files import image_bytes, pair_members, write_tar


def shards(pattern: Path | str, num_samples: int | None = None) -> WebDatasetSource:
    return WebDatasetSource(type="webdataset", shards=str(pattern), num_samples=num_samples)


def captions(source: PairSource) -> list[str]:
    return [source.read(index).caption for index in range(len(source))]


class TestShards:
    def test_pairs_are_read_in_the_order_of_shards_and_members(self, tmp_path: Path) -> None:
        for shard in range(3):
            write_tar(tmp_path / f"{shard:05d}.tar", pair_members(range(shard * 4, shard * 4 + 4)))
        source = open_sources([shards(tmp_path / "{00000..00002}.tar")], tmp_path / "cache")
        assert captions(source) == [f"caption {number}" for number in range(12)]
        assert [source.read(number).image_bytes for number in range(12)] == [image_bytes(number) for number in range(12)]
        assert source.read(5).key == f"{tmp_path / '00001.tar'}:000005"

    def test_every_image_extension_counts_and_others_are_passed_over(self, tmp_path: Path) -> None:
        members: dict[str, bytes] = {}
        for key, extension, kind in (
            ("a", "png", "PNG"),
            ("b", "jpg", "JPEG"),
            ("c", "jpeg", "JPEG"),
            ("d", "webp", "WEBP"),
            ("e", "PNG", "PNG"),
        ):
            members |= {f"{key}.json": b"{}", f"{key}.{extension}": image_bytes(kind=kind), f"{key}.txt": key.encode(), f"{key}.cls": b"3"}
        source = open_sources([shards(write_tar(tmp_path / "0.tar", members))], tmp_path)
        assert captions(source) == ["a", "b", "c", "d", "e"]

    def test_key_ends_at_the_first_dot_of_the_file_name(self, tmp_path: Path) -> None:
        members = {
            "v1.0/a.png": image_bytes(1),
            "v1.0/a.seg.png": image_bytes(2),
            "v1.0/a.txt": b"one",
            "v2.0/a.png": image_bytes(3),
            "v2.0/a.txt": b"two",
        }
        source = open_sources([shards(write_tar(tmp_path / "0.tar", members))], tmp_path)
        assert [(source.read(index).caption, source.read(index).image_bytes) for index in range(len(source))] == [
            ("one", image_bytes(1)),
            ("two", image_bytes(3)),
        ]

    def test_members_of_a_pair_may_lie_apart_and_have_long_names(self, tmp_path: Path) -> None:
        key = "folder/" + "k" * 200
        members = {f"{key}.txt": b"far", **pair_members(range(3)), f"{key}.png": image_bytes(9)}
        source = open_sources([shards(write_tar(tmp_path / "0.tar", members))], tmp_path)
        assert captions(source) == ["far", "caption 0", "caption 1", "caption 2"]

    def test_image_without_caption_is_left_out_with_a_warning(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        members = pair_members(range(4))
        del members["000001.txt"]
        source = open_sources([shards(write_tar(tmp_path / "0.tar", members))], tmp_path)
        assert captions(source) == ["caption 0", "caption 2", "caption 3"]
        assert "1 images" in caplog.text
        assert "no caption" in caplog.text

    @pytest.mark.parametrize("content", [b" \n ", b"\xff\xfe\xfa"])
    def test_unusable_caption_is_corrupt(self, tmp_path: Path, content: bytes) -> None:
        source = open_sources([shards(write_tar(tmp_path / "0.tar", {"a.png": image_bytes(), "a.txt": content}))], tmp_path)
        with pytest.raises(CorruptSampleError, match=r"0\.tar:a: its caption is"):
            source.read(0)

    def test_num_samples_takes_the_first_and_leaves_later_shards_alone(self, tmp_path: Path) -> None:
        write_tar(tmp_path / "0.tar", pair_members(range(5)))
        write_tar(tmp_path / "1.tar", pair_members(range(5, 10)))
        (tmp_path / "2.tar").write_bytes(b"no tar at all" * 1000)
        source = open_sources([shards(tmp_path / "{0..2}.tar", num_samples=7)], tmp_path)
        assert captions(source) == [f"caption {number}" for number in range(7)]

    @pytest.mark.parametrize("cut", [0, 100, 700, 3000, 5000])
    def test_truncated_tar_gives_the_pairs_before_the_cut(self, tmp_path: Path, caplog: pytest.LogCaptureFixture, cut: int) -> None:
        whole = write_tar(tmp_path / "whole.tar", pair_members(range(5)))
        index = load_shard_index(whole)
        ends = [
            max(int(index.images.offsets[row] + index.images.sizes[row]), int(index.captions.offsets[row] + index.captions.sizes[row]))
            for row in range(5)
        ]
        (tmp_path / "0.tar").write_bytes(whole.read_bytes()[:cut])
        write_tar(tmp_path / "1.tar", pair_members(range(8, 9)))
        source = open_sources([shards(tmp_path / "[01].tar")], tmp_path)
        assert captions(source) == [f"caption {row}" for row, end in enumerate(ends) if end <= cut] + ["caption 8"]
        assert "0.tar is damaged" in caplog.text

    @pytest.mark.parametrize("cut_blocks", [0, 1])
    def test_cut_between_two_members_is_noticed(self, tmp_path: Path, caplog: pytest.LogCaptureFixture, cut_blocks: int) -> None:
        path = write_tar(tmp_path / "0.tar", pair_members(range(2)))
        index = load_shard_index(path)
        assert not caplog.text
        end = int(index.captions.offsets[1]) + 512 - cut_blocks * 512  # just after, or just before, the last member's data
        path.write_bytes(path.read_bytes()[:end])
        assert len(open_sources([shards(path)], tmp_path)) == 2 - cut_blocks
        assert "damaged" in caplog.text

    def test_overwritten_header_is_noticed(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        path = write_tar(tmp_path / "0.tar", pair_members(range(4)))
        header = int(load_shard_index(path).images.offsets[2]) - 512
        content = bytearray(path.read_bytes())
        content[header : header + 512] = b"x" * 512
        path.write_bytes(content)
        assert captions(open_sources([shards(path)], tmp_path)) == ["caption 0", "caption 1"]
        assert f"no valid header at byte {header:,}" in caplog.text

    def test_what_is_no_tar_is_refused(self, tmp_path: Path) -> None:
        path = tmp_path / "0.tar"
        path.write_bytes(random.Random(0).randbytes(4096))  # not any: they could begin as a compressed file does
        with pytest.raises(InvalidDataError, match="not a tar file"):
            open_sources([shards(path)], tmp_path)
        path.write_bytes(gzip.compress(write_tar(tmp_path / "plain.tar", pair_members(range(2))).read_bytes()))
        with pytest.raises(InvalidDataError, match=r"compressed with gzip.*decompress"):
            open_sources([shards(path)], tmp_path)

    def test_missing_shards_and_empty_shards_are_named(self, tmp_path: Path) -> None:
        write_tar(tmp_path / "0.tar", pair_members(range(2)))
        with pytest.raises(InvalidDataError, match=r"cannot read shard .*1\.tar"):
            open_sources([shards(tmp_path / "{0..1}.tar")], tmp_path)
        with pytest.raises(InvalidDataError, match=r"no file matches .*nothing-\*"):
            open_sources([shards(tmp_path / "nothing-*.tar")], tmp_path)
        with pytest.raises(InvalidDataError, match="unbalanced braces"):
            open_sources([shards(tmp_path / "{0..1.tar")], tmp_path)
        write_tar(tmp_path / "0.tar", {"readme.md": b"hello"})
        with pytest.raises(InvalidDataError, match="no image-text pair"):
            open_sources([shards(tmp_path / "0.tar")], tmp_path)

    def test_globs_are_sorted_and_braces_keep_their_order(self, tmp_path: Path) -> None:
        for name in ("b", "a", "c[1]"):
            (tmp_path / f"{name}.tar").touch()
        assert [Path(name).name for name in expand_shards(str(tmp_path / "?.tar"))] == ["a.tar", "b.tar"]
        assert [Path(name).name for name in expand_shards(str(tmp_path / "{b,a}.tar"))] == ["b.tar", "a.tar"]
        assert [Path(name).name for name in expand_shards(str(tmp_path / "c[1].tar"))] == ["c[1].tar"]

    def test_shard_that_shrinks_after_indexing_gives_corrupt_samples(self, tmp_path: Path) -> None:
        path = write_tar(tmp_path / "0.tar", pair_members(range(3)))
        source = open_sources([shards(path)], tmp_path)
        os.truncate(path, 600)
        with pytest.raises(CorruptSampleError, match="000002"):
            source.read(2)


class TestIndexCache:
    def test_index_is_reused_until_the_tar_changes(self, tmp_path: Path) -> None:
        path = write_tar(tmp_path / "0.tar", pair_members(range(3)))
        cache = tmp_path / "cache"
        first = load_shard_index(path, cache)
        (file,) = cache.iterdir()
        stamp = file.stat().st_mtime_ns
        again = load_shard_index(path, cache)
        assert file.stat().st_mtime_ns == stamp
        assert [again.keys[row] for row in range(3)] == [first.keys[row] for row in range(3)] == ["000000", "000001", "000002"]
        assert (again.images.offsets == first.images.offsets).all()
        assert (again.captions.sizes == first.captions.sizes).all()

        write_tar(path, pair_members(range(5)))
        assert len(load_shard_index(path, cache)) == 5

    def test_cached_index_is_really_used(self, tmp_path: Path) -> None:
        path = write_tar(tmp_path / "0.tar", pair_members(range(3)))
        load_shard_index(path, tmp_path / "cache")
        status = path.stat()
        path.write_bytes(bytes(status.st_size))  # same size and, below, same time: only the cache can know of its samples
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
        assert len(load_shard_index(path, tmp_path / "cache")) == 3
        assert len(load_shard_index(path)) == 0

    @pytest.mark.parametrize("content", [b"", b"garbage", b"PK\x03\x04 half a zip"])
    def test_broken_cache_file_is_replaced(self, tmp_path: Path, content: bytes, caplog: pytest.LogCaptureFixture) -> None:
        path = write_tar(tmp_path / "0.tar", pair_members(range(3)))
        cache = tmp_path / "cache"
        load_shard_index(path, cache)
        (file,) = cache.iterdir()
        file.write_bytes(content)
        assert len(load_shard_index(path, cache)) == 3
        assert "unreadable" in caplog.text
        caplog.clear()
        assert len(load_shard_index(path, cache)) == 3
        assert not caplog.text

    def test_index_whose_parts_disagree_is_replaced(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        path = write_tar(tmp_path / "0.tar", pair_members(range(3)))
        load_shard_index(path, tmp_path / "cache")
        (file,) = (tmp_path / "cache").iterdir()
        with np.load(file) as stored:
            parts = dict(stored)
        np.savez(file, **(parts | {"image_offsets": parts["image_offsets"][:2]}))
        assert load_shard_index(path, tmp_path / "cache").images.offsets.shape == (3,)
        assert "unreadable" in caplog.text

    def test_cache_that_cannot_be_written_costs_a_warning(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        path = write_tar(tmp_path / "0.tar", pair_members(range(3)))
        (tmp_path / "cache").write_text("a file where the folder should be")
        assert len(load_shard_index(path, tmp_path / "cache")) == 3
        assert "cannot keep the index" in caplog.text

    def test_jobs_at_once_share_one_index(self, tmp_path: Path) -> None:
        path = write_tar(tmp_path / "0.tar", pair_members(range(50)))
        with ThreadPoolExecutor(8) as pool:
            found = list(pool.map(lambda _: len(load_shard_index(path, tmp_path / "cache")), range(32)))
        assert found == [50] * 32
        assert len(list((tmp_path / "cache").iterdir())) == 1

    def test_damage_is_told_again_from_the_cache(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        path = write_tar(tmp_path / "0.tar", pair_members(range(3)))
        os.truncate(path, 2000)
        with caplog.at_level(logging.WARNING):
            load_shard_index(path, tmp_path / "cache")
            load_shard_index(path, tmp_path / "cache")
        assert caplog.text.count("damaged") == 2


class TestTables:
    def test_clip_kd_table_loads_unchanged(self, tmp_path: Path) -> None:
        (tmp_path / "images").mkdir()
        for number in range(2):
            (tmp_path / f"images/{number}.png").write_bytes(image_bytes(number))
        (tmp_path / "train.tsv").write_text(
            "filepath\ttitle\nimages/0.png\ta small, grey cat\nimages/1.png\tcafé “au lait”\n", encoding="utf-8"
        )
        source = open_sources([CsvSource(type="csv", path=str(tmp_path / "train.tsv"))], tmp_path)
        assert captions(source) == ["a small, grey cat", "café “au lait”"]
        assert source.read(1).image_bytes == image_bytes(1)
        assert source.read(1).key == str(tmp_path / "images/1.png")

    def test_columns_separator_root_and_absolute_paths(self, tmp_path: Path) -> None:
        (tmp_path / "0.png").write_bytes(image_bytes(0))
        (tmp_path / "root").mkdir()
        (tmp_path / "root/1.png").write_bytes(image_bytes(1))
        table = tmp_path / "t.csv"
        table.write_text(f'id,caption,image\n7,"one, two",{tmp_path}/0.png\n\n8,three,1.png\n9,four,2.png\n', encoding="utf-8-sig")
        spec = CsvSource(
            type="csv",
            path=str(table),
            image_column="image",
            caption_column="caption",
            separator=",",
            image_root=str(tmp_path / "root"),
            num_samples=2,
        )
        source = open_sources([spec], tmp_path)
        assert captions(source) == ["one, two", "three"]
        assert [source.read(index).image_bytes for index in range(2)] == [image_bytes(0), image_bytes(1)]

    def test_missing_column_names_those_there_are(self, tmp_path: Path) -> None:
        table = tmp_path / "t.csv"
        table.write_text("path,text\na.png,b\n")
        with pytest.raises(InvalidDataError, match=r"no column 'filepath'.*'path,text'.*`image_column`"):
            open_sources([CsvSource(type="csv", path=str(table))], tmp_path)
        with pytest.raises(InvalidDataError, match=r"no column 'title'.*\['path', 'text'\]"):
            open_sources([CsvSource(type="csv", path=str(table), separator=",", image_column="path")], tmp_path)

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (None, "cannot read table"),
            (b"", "no column"),
            (b"filepath\ttitle\n", "no rows"),
            (b"filepath\ttitle\n\xff\t\xfe\n", "not UTF-8"),
        ],
    )
    def test_unusable_table_is_refused(self, tmp_path: Path, content: bytes | None, message: str) -> None:
        table = tmp_path / "t.tsv"
        if content is not None:
            table.write_bytes(content)
        with pytest.raises(InvalidDataError, match=message):
            open_sources([CsvSource(type="csv", path=str(table))], tmp_path)

    def test_missing_image_and_short_row_are_corrupt(self, tmp_path: Path) -> None:
        (tmp_path / "0.png").write_bytes(image_bytes(0))
        (tmp_path / "t.tsv").write_text("filepath\ttitle\ngone.png\tx\n0.png\n0.png\tfine\n")
        source = open_sources([CsvSource(type="csv", path=str(tmp_path / "t.tsv"))], tmp_path)
        with pytest.raises(CorruptSampleError, match=r"gone\.png"):
            source.read(0)
        with pytest.raises(CorruptSampleError, match="caption is empty"):
            source.read(1)
        assert source.read(2).caption == "fine"


def test_sources_are_joined_in_order(tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", pair_members(range(3)))
    (tmp_path / "0.png").write_bytes(image_bytes(0))
    (tmp_path / "t.tsv").write_text("filepath\ttitle\n0.png\tfrom the table\n")
    joined = open_sources(
        [shards(tmp_path / "0.tar"), CsvSource(type="csv", path=str(tmp_path / "t.tsv")), shards(tmp_path / "0.tar", 1)], tmp_path
    )
    assert isinstance(joined, JoinedPairs)
    assert captions(joined) == ["caption 0", "caption 1", "caption 2", "from the table", "caption 0"]


def test_string_table_keeps_any_string() -> None:
    strings = ["", "plain", "naïve 😀", "\udcff undecodable name", ""]
    table = StringTable.from_strings(strings)
    assert [table[index] for index in range(len(table))] == strings
    assert len(StringTable.from_strings([])) == 0
