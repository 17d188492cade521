"""The fingerprint of data: the same wherever it lies, another one when it is another."""

from collections.abc import Callable
from pathlib import Path

import pytest

from cliprd_core.data.sources import open_sources
from cliprd_core.spec import CsvSource, DataSource, WebDatasetSource
from tests.data_files import image_bytes, pair_members, write_tar

Members = dict[str, bytes]


def shards(folder: Path, name: str = "*.tar", num_samples: int | None = None) -> WebDatasetSource:
    return WebDatasetSource(type="webdataset", shards=str(folder / name), num_samples=num_samples)


def fingerprint(folder: Path, *sources: DataSource) -> str:
    return open_sources(sources or [shards(folder)], folder / "cache").fingerprint


def write_two(folder: Path, change: Callable[[Members], Members] = lambda members: members) -> Path:
    write_tar(folder / "0.tar", pair_members(range(5)))
    write_tar(folder / "1.tar", change(pair_members(range(5, 10))))
    return folder


def with_other(name: str, content: bytes) -> Callable[[Members], Members]:
    return lambda members: members | {name: content}


def reordered(members: Members) -> Members:
    return dict([*list(members.items())[2:], *list(members.items())[:2]])


def renamed(members: Members) -> Members:
    return {name.replace("000007", "00007x"): content for name, content in members.items()}


class TestShards:
    def test_is_64_hexadecimal_digits_fixed_for_ever(self, tmp_path: Path) -> None:
        """Whatever is stored under it would be lost with another release."""
        write_tar(tmp_path / "0.tar", {"a.png": b"not decoded", "a.txt": b"a caption"})
        assert fingerprint(tmp_path) == "77426f22aa4a2953c6ed76b354687bfe15f3e199d6c1ad5c7bcde80278ab5a7b"

    def test_folder_and_cache_do_not_matter(self, tmp_path: Path) -> None:
        first = fingerprint(write_two(tmp_path / "here"))
        assert first == fingerprint(tmp_path / "here")  # out of the cached index
        (tmp_path / "here").rename(tmp_path / "there")
        assert fingerprint(tmp_path / "there") == first

    @pytest.mark.parametrize(
        "change",
        [
            with_other("000007.txt", b"caption X"),
            with_other("000007.png", image_bytes(8)),
            with_other("000009.txt", b"a longer caption"),
            with_other("000010.png", image_bytes(10)),
            reordered,
            renamed,
        ],
    )
    def test_every_change_shows(self, tmp_path: Path, change: Callable[[Members], Members]) -> None:
        assert fingerprint(write_two(tmp_path / "changed", change)) != fingerprint(write_two(tmp_path / "plain"))

    def test_change_at_the_end_of_a_long_image_shows_though_the_size_stays(self, tmp_path: Path) -> None:
        first = fingerprint(write_two(tmp_path / "first", with_other("000007.png", b"x" * 100_000)))
        assert fingerprint(write_two(tmp_path / "other", with_other("000007.png", b"x" * 99_999 + b"y"))) != first

    def test_number_and_order_of_shards_and_limits_matter(self, tmp_path: Path) -> None:
        write_two(tmp_path)
        limits = [fingerprint(tmp_path, shards(tmp_path, num_samples=limit)) for limit in (3, 4, 10, None)]
        orders = [fingerprint(tmp_path, shards(tmp_path, order)) for order in ("{0,1}.tar", "{1,0}.tar", "0.tar")]
        assert limits[2] == limits[3] == orders[0]  # the same ten pairs
        assert len({*limits, *orders}) == 5

    def test_order_of_joined_sources_matters(self, tmp_path: Path) -> None:
        write_two(tmp_path)
        first, second = shards(tmp_path, "0.tar"), shards(tmp_path, "1.tar")
        found = [fingerprint(tmp_path, *sources) for sources in ([first, second], [second, first], [first], [first, first])]
        assert len(set(found)) == 4


class TestTables:
    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        folder = tmp_path / "here"
        folder.mkdir()
        for number in range(3):
            (folder / f"{number}.png").write_bytes(image_bytes(number))
        self.write(folder)
        return folder

    def write(self, folder: Path, rows: str = "0.png\tzero\n1.png\tone\n2.png\ttwo\n") -> None:
        (folder / "t.tsv").write_text(f"filepath\ttitle\n{rows}")

    def of(self, folder: Path, num_samples: int | None = None) -> str:
        return fingerprint(folder, CsvSource(type="csv", path=str(folder / "t.tsv"), num_samples=num_samples))

    def test_folder_does_not_matter_even_where_paths_are_absolute(self, folder: Path) -> None:
        first = self.of(folder)
        self.write(folder, f"{folder}/0.png\tzero\n{folder}//1.png\tone\n2.png\ttwo\n")
        assert self.of(folder) == first
        moved = folder.rename(folder.with_name("there"))
        self.write(moved)
        assert self.of(moved) == first

    def test_captions_images_order_and_limits_matter(self, folder: Path) -> None:
        found = [self.of(folder), self.of(folder, 2)]
        self.write(folder, "0.png\tzero\n1.png\tOne\n2.png\ttwo\n")
        found.append(self.of(folder))
        self.write(folder, "1.png\tone\n0.png\tzero\n2.png\ttwo\n")
        found.append(self.of(folder))
        self.write(folder)
        (folder / "1.png").write_bytes(image_bytes(7))
        found.append(self.of(folder))
        (folder / "1.png").unlink()
        found.append(self.of(folder))
        assert len(set(found)) == 6
