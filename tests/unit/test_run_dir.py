"""Records of a run survive torn lines, and atomic writes leave no half file."""

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cliprd_core.run_dir import (
    CHECKPOINT_MARKER,
    ErrorReason,
    ErrorRecord,
    append_record,
    cache_dir,
    checkpoint_dir,
    complete_checkpoints,
    read_record,
    read_records,
    write_atomically,
)


def error(message: str) -> ErrorRecord:
    return ErrorRecord(reason=ErrorReason.INTERNAL, message=message)


def test_appended_records_come_back_in_order_with_offsets(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    for message in ("one", "two", "three"):
        append_record(path, error(message))
    records = list(read_records(path, ErrorRecord))
    assert [record.message for record, _ in records] == ["one", "two", "three"]
    assert records[-1][1] == path.stat().st_size
    after_first = records[0][1]
    assert [record.message for record, _ in read_records(path, ErrorRecord, after_first)] == ["two", "three"]


def test_a_growing_last_line_is_left_for_the_next_read(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    append_record(path, error("one"))
    whole = error("two").model_dump_json()
    with path.open("a") as file:
        file.write(whole[:10])
    (first,) = read_records(path, ErrorRecord)
    with path.open("a") as file:
        file.write(whole[10:] + "\n")
    assert [record.message for record, _ in read_records(path, ErrorRecord, first[1])] == ["two"]


@given(cut=st.integers(min_value=1, max_value=40))
def test_a_torn_line_costs_only_itself(cut: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("torn") / "records.jsonl"
    append_record(path, error("one"))
    append_record(path, error("torn"))
    os.truncate(path, path.stat().st_size - cut)
    append_record(path, error("after"))
    messages = [record.message for record, _ in read_records(path, ErrorRecord)]
    assert messages[0] == "one"
    assert messages[-1] == "after"
    assert messages in (["one", "after"], ["one", "torn", "after"])


def test_write_atomically_replaces_and_leaves_nothing_beside(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    write_atomically(path, "old")
    write_atomically(path, error("new").model_dump_json())
    assert [one.name for one in tmp_path.iterdir()] == ["result.json"]
    found = read_record(path, ErrorRecord)
    assert found is not None
    assert found.message == "new"
    assert read_record(tmp_path / "missing.json", ErrorRecord) is None


def test_only_marked_checkpoints_count_and_they_sort_by_step(tmp_path: Path) -> None:
    for step in (1000, 20, 300):
        checkpoint_dir(tmp_path, step).mkdir(parents=True)
    for step in (1000, 20):
        (checkpoint_dir(tmp_path, step) / CHECKPOINT_MARKER).write_text("{}")
    assert complete_checkpoints(tmp_path) == [checkpoint_dir(tmp_path, 20), checkpoint_dir(tmp_path, 1000)]


def test_the_cache_is_where_the_environment_says_else_the_runs_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CLIPRD_CACHE_DIR", raising=False)
    assert cache_dir(tmp_path / "run") == tmp_path / "run/cache"
    monkeypatch.setenv("CLIPRD_CACHE_DIR", str(tmp_path / "shared"))
    assert cache_dir(tmp_path / "run") == tmp_path / "shared"
