"""The pump: whole records only, in batches, from where it left off, and nothing lost while the store is away."""

import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest

from cliprd_core.run_dir import CheckpointFile, append_record
from worker.pump import FIRST_RETRY_SECONDS, MAX_BATCH, LogPump, RecordPump


def record(number: int) -> CheckpointFile:
    return CheckpointFile(name=f"{number}", num_bytes=number, sha256="")


def test_it_continues_where_it_left_off_and_leaves_a_growing_line(tmp_path: Path) -> None:
    path, written = tmp_path / "records.jsonl", list[int]()
    pump = RecordPump(path, CheckpointFile, lambda batch: written.extend(one.num_bytes for one in batch), (OSError,))
    assert not pump.pump()  # no file yet
    append_record(path, record(1))
    with path.open("a") as file:
        file.write('{"name": "2", "num_by')
    assert not pump.pump()
    assert written == [1]
    with path.open("a") as file:
        file.write('tes": 2, "sha256": ""}\n')
    pump.pump()
    pump.pump()
    assert written == [1, 2]
    assert pump.is_drained()


def test_large_files_come_in_batches(tmp_path: Path) -> None:
    path, sizes = tmp_path / "records.jsonl", list[int]()
    path.write_text("".join(record(number).model_dump_json() + "\n" for number in range(2 * MAX_BATCH + 3)))
    pump = RecordPump(path, CheckpointFile, lambda batch: sizes.append(len(batch)), (OSError,))
    assert pump.pump()
    assert not pump.is_drained()
    assert pump.pump()
    assert not pump.pump()
    assert sizes == [MAX_BATCH, MAX_BATCH, 3]


def test_an_outage_delays_and_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, written = tmp_path / "records.jsonl", list[int]()
    is_away, now = True, 1000.0
    monkeypatch.setattr("worker.pump.time", SimpleNamespace(monotonic=lambda: now))

    def write(batch: Sequence[CheckpointFile]) -> None:
        if is_away:
            raise ConnectionError("store away")
        written.extend(one.num_bytes for one in batch)

    pump = RecordPump(path, CheckpointFile, write, (ConnectionError,))
    append_record(path, record(1))
    assert not pump.pump()
    append_record(path, record(2))
    is_away = False
    now += FIRST_RETRY_SECONDS - 0.1
    assert not pump.pump()
    assert written == [], "it must pause before it tries again"
    now += 0.2
    pump.pump()
    assert written == [1, 2]
    assert pump.is_drained()


def test_a_network_that_breaks_large_batches_lets_smaller_ones_through(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("worker.pump.FIRST_RETRY_SECONDS", 0.001)
    monkeypatch.setattr("worker.pump.MAX_RETRY_SECONDS", 0.001)
    path, written = tmp_path / "records.jsonl", list[int]()
    path.write_text("".join(record(number).model_dump_json() + "\n" for number in range(MAX_BATCH)))

    def write(batch: Sequence[CheckpointFile]) -> None:
        if len(batch) > 70:
            raise ConnectionError("broken in its midst")
        written.extend(one.num_bytes for one in batch)

    pump = RecordPump(path, CheckpointFile, write, (ConnectionError,))
    deadline = time.monotonic() + 60
    while not pump.is_drained():
        pump.pump()
        assert time.monotonic() < deadline
    assert written == list(range(MAX_BATCH))


def test_other_errors_pass_through(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    append_record(path, record(1))

    def refuse(_batch: Sequence[CheckpointFile]) -> None:
        raise LookupError("lease lost")

    with pytest.raises(LookupError):
        RecordPump(path, CheckpointFile, refuse, (ConnectionError,)).pump()


def test_the_log_is_copied_in_whole_lines_and_at_the_end_to_the_last_letter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("worker.pump.LOG_PAUSE_SECONDS", 0)
    log = tmp_path / "log.txt"
    copied: list[str] = []
    pump = LogPump(log, copied.append, (ConnectionError,))
    with log.open("a") as file:
        for text, expected in (("one\ntw", ["one\n"]), ("o", ["one\n"]), ("\nthree", ["one\n", "two\n"])):
            file.write(text)
            file.flush()
            pump.pump()
            assert copied == expected
    while not pump.drain():
        pass
    assert "".join(copied) == "one\ntwo\nthree"


def test_the_log_waits_for_a_store_that_is_out_of_reach(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("worker.pump.FIRST_RETRY_SECONDS", 0.01)
    log = tmp_path / "log.txt"
    failures = [ConnectionError(), ConnectionError()]
    copied: list[str] = []

    def write(text: str) -> None:
        if failures:
            raise failures.pop()
        copied.append(text)

    pump = LogPump(log, write, (ConnectionError,))
    assert pump.drain(), "there is no log yet"
    log.write_bytes(b"x" * 100_000 + b"\xff\n")
    deadline = time.monotonic() + 60
    while not pump.drain():
        assert time.monotonic() < deadline
    assert "".join(copied) == "x" * 100_000 + "\ufffd\n"
    assert len(copied) == 2


def test_what_a_killed_worker_left_of_the_log_comes_with_the_next_attempt(tmp_path: Path) -> None:
    log, copied = tmp_path / "log.txt", list[str]()

    def refuse(_text: str) -> None:
        raise ConnectionError("store away")

    log.write_text("never pumped\n")
    LogPump(log, refuse, (ConnectionError,)).pump()
    for printed in ("", "pumped\n", "killed in the mid", "dle of a line\n"):
        with log.open("a") as file:
            file.write(printed)
        LogPump(log, copied.append, (ConnectionError,)).pump()
    assert copied == ["never pumped\n", "pumped\n", "killed in the middle of a line\n"]


def test_a_log_whose_note_is_damaged_is_copied_again(tmp_path: Path) -> None:
    log, copied = tmp_path / "log.txt", list[str]()
    log.write_text("one\n")
    (tmp_path / "log.txt.pumped").write_text("")
    LogPump(log, copied.append, (ConnectionError,)).pump()
    assert copied == ["one\n"]
