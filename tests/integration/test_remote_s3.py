"""Shards in S3, against moto's server: ranges, globs, credentials, changes."""

from pathlib import Path
from typing import Any

import pytest

from cliprd_core.data import remote
from cliprd_core.data.errors import InvalidDataError
from cliprd_core.data.sources import PairSource, expand_shards, open_sources
from cliprd_core.spec import WebDatasetSource
from tests.data_files import pair_members, write_tar

BUCKET = "pairs"


@pytest.fixture
def s3(s3_client: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A client of a bucket with `train/0.tar` to `2.tar`, three pairs each. The library finds it as any AWS tool does."""
    monkeypatch.setattr(remote, "PAUSES_SECONDS", (0.0,))
    client = s3_client
    client.create_bucket(Bucket=BUCKET)
    for number in range(3):
        put(client, tmp_path, f"train/{number}.tar", range(number * 3, number * 3 + 3))
    return client


def put(client: Any, folder: Path, key: str, numbers: range) -> None:
    client.put_object(Bucket=BUCKET, Key=key, Body=write_tar(folder / "some.tar", pair_members(numbers)).read_bytes())


def opened(cache: Path, pattern: str) -> PairSource:
    return open_sources([WebDatasetSource(type="webdataset", shards=pattern)], cache)


def captions(source: PairSource) -> list[str]:
    return [source.read(index).caption for index in range(len(source))]


@pytest.mark.usefixtures("s3")
def test_ranges_and_globs_read_the_same_pairs(tmp_path: Path) -> None:
    expected = [f"caption {number}" for number in range(9)]
    assert captions(opened(tmp_path / "cache", f"s3://{BUCKET}/train/{{0..2}}.tar")) == expected
    assert captions(opened(tmp_path / "cache", f"s3://{BUCKET}/train/*.tar")) == expected
    assert list(expand_shards(f"s3://{BUCKET}/*/[01].tar")) == [f"s3://{BUCKET}/train/{number}.tar" for number in (0, 1)]


def test_replaced_object_is_fetched_and_indexed_again(s3: Any, tmp_path: Path) -> None:
    assert len(opened(tmp_path / "cache", f"s3://{BUCKET}/train/1.tar")) == 3
    put(s3, tmp_path, "train/1.tar", range(50, 55))
    assert captions(opened(tmp_path / "cache", f"s3://{BUCKET}/train/1.tar")) == [f"caption {number}" for number in range(50, 55)]
    put(s3, tmp_path, "train/1.tar", range(3, 6))


@pytest.mark.usefixtures("s3")
@pytest.mark.parametrize("key", ["train/7.tar", "train/none-*.tar"])
def test_missing_objects_name_the_field(tmp_path: Path, key: str) -> None:
    with pytest.raises(InvalidDataError, match=r"`shards`"):
        opened(tmp_path / "cache", f"s3://{BUCKET}/{key}")


@pytest.mark.usefixtures("s3")
@pytest.mark.parametrize("name", ["0.tar", "*.tar"])
def test_missing_bucket_names_the_field(tmp_path: Path, name: str) -> None:
    with pytest.raises(InvalidDataError, match=r"`shards`"):
        opened(tmp_path / "cache", f"s3://no-such-bucket/{name}")
