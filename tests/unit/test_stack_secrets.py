"""The passwords of a stack's own PostgreSQL and Redis."""

from __future__ import annotations

import stat
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from service.stack_secrets import main


def test_passwords_are_made_once_and_addresses_hold_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders = {name: tmp_path / name for name in ("postgres", "redis", "cliprd")}
    for folder in folders.values():
        folder.mkdir()
    monkeypatch.setattr("sys.argv", ["stack_secrets", *(f"--{name}={folder}" for name, folder in folders.items())])

    main()
    first = {file.relative_to(tmp_path): file.read_text() for file in tmp_path.rglob("*") if file.is_file()}
    main()
    assert {file.relative_to(tmp_path): file.read_text() for file in tmp_path.rglob("*") if file.is_file()} == first

    assert {str(name) for name in first} == {
        "postgres/password",
        "redis/password",
        "redis/redis.conf",
        "cliprd/database_url",
        "cliprd/broker_url",
    }
    database, broker = (urlsplit(first[Path("cliprd") / name].strip()) for name in ("database_url", "broker_url"))
    passwords = first[Path("postgres/password")], first[Path("redis/password")]
    assert (database.scheme, database.username, database.hostname, database.path) == ("postgresql", "cliprd", "postgres", "/cliprd")
    assert (broker.scheme, broker.username, broker.hostname, broker.port, broker.path) == ("redis", "", "redis", 6379, "/0")
    assert (database.password, broker.password) == passwords
    assert first[Path("redis/redis.conf")] == f"requirepass {passwords[1]}\n"
    assert passwords[0] != passwords[1]
    assert min(map(len, passwords)) >= 43  # 32 bytes in base64
    for name in first:
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o444


def test_a_password_of_ones_own_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "password").write_text("mine\n")
    monkeypatch.setattr("sys.argv", ["stack_secrets", *(f"--{name}={tmp_path}" for name in ("postgres", "redis", "cliprd"))])
    main()
    assert (tmp_path / "database_url").read_text() == "postgresql://cliprd:mine@postgres/cliprd\n"
