"""Settings from variables and from the files that variables name."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic_settings import SettingsError

from service.environment import EnvironmentSettings
from service.settings import Settings
from worker.settings import WorkerSettings

BOTH = pytest.mark.parametrize("kind", [Settings, WorkerSettings])


@BOTH
def test_a_setting_is_read_from_the_file_that_its_variable_names(
    kind: type[Settings | WorkerSettings], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "url").write_text("postgresql://me:secret@there/cliprd\n")
    (tmp_path / "hosts").write_text("data.example.org,s3://bucket")
    monkeypatch.setenv("CLIPRD_DATABASE_URL_FILE", str(tmp_path / "url"))
    monkeypatch.setenv("CLIPRD_REMOTE_HOSTS_FILE", str(tmp_path / "hosts"))
    monkeypatch.setenv("CLIPRD_BROKER_URL", "redis://there/0")
    settings = kind()
    assert settings.database_url == "postgresql://me:secret@there/cliprd"
    assert settings.remote_hosts == ("data.example.org", "s3://bucket")
    assert settings.broker_url == "redis://there/0"
    assert kind(database_url="sqlite:///other.db").database_url == "sqlite:///other.db"


def test_a_secret_is_read_from_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "secret").write_text("whsec_" + "QUJD" * 8 + "\r\n")
    monkeypatch.setenv("CLIPRD_WEBHOOK_SECRET_FILE", str(tmp_path / "secret"))
    secret = WorkerSettings().webhook_secret
    assert secret is not None
    assert secret.get_secret_value() == "whsec_" + "QUJD" * 8
    assert "QUJD" not in repr(secret)


@pytest.mark.parametrize(
    ("content", "other", "problem"),
    [
        (None, None, r"CLIPRD_DATABASE_URL_FILE: .*url' can't be read \(No such file or directory\); name a file"),
        (b"", None, "is empty; write the value into it"),
        (b"\n", None, "is empty"),
        (b"\xff", None, r"can't be read \(it is not UTF-8\)"),
        (b"postgresql://there/cliprd", "sqlite:///here.db", "CLIPRD_DATABASE_URL and CLIPRD_DATABASE_URL_FILE are both set; unset one"),
        (b"postgresql://there/cliprd", "", "both set"),
    ],
)
def test_a_file_that_says_nothing_is_an_error_and_never_a_default(
    content: bytes | None, other: str | None, problem: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if content is not None:
        (tmp_path / "url").write_bytes(content)
    if other is not None:
        monkeypatch.setenv("CLIPRD_DATABASE_URL", other)
    monkeypatch.setenv("CLIPRD_DATABASE_URL_FILE", str(tmp_path / "url"))
    for kind in (Settings, WorkerSettings):
        with pytest.raises(SettingsError, match=problem):
            kind()


def test_an_empty_name_is_no_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLIPRD_DATABASE_URL_FILE", "")
    with pytest.raises(SettingsError, match="'' can't be read"):
        Settings()


@BOTH
def test_no_setting_takes_the_variable_of_another_ones_file(kind: type[EnvironmentSettings]) -> None:
    names = set(Settings.model_fields) | set(WorkerSettings.model_fields)
    assert not names & {f"{name}_file" for name in kind.model_fields}
