"""What `scripts/compose_backup.sh` refuses and notices, with a `docker` that acts as the stack; `make compose-test` uses a real one."""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import tarfile
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from service.store.models import Artifact

SCRIPT = Path(__file__).parents[2] / "scripts/compose_backup.sh"
DOCKER = r"""#!/bin/sh
cd "$STACK"
case "$*" in
    "compose config") cat config.yaml ;;
    *" pg_dump "*) echo dump ;;
    *" pg_restore --list") cat contents ;;
    *" psql "*" IN "*) echo "asked for $*" ;;
    *" psql "*) if [ -e asked ]; then cat rows_after; else touch asked; cat rows; fi ;;
    *" api sh -c "*) sh -c "$(printf %s "$7" | sed "s|/var/lib/cliprd/artifacts|$STACK/artifacts|")" ;;
    *) echo "unexpected: docker $*" >&2; exit 9 ;;
esac
"""
IN_THE_STACK = {"CLIPRD_DATABASE_URL_FILE": "/run/secrets/cliprd/database_url", "CLIPRD_BROKER_URL_FILE": "/run/secrets/cliprd/broker_url"}
FILES = {f"{number:02x}/{number:032x}": f"weights {number}".encode() for number in range(3)}
FIRST = next(iter(FILES))


@dataclass(frozen=True)
class BackedUp:
    """How the script ended."""

    status: int
    said: str
    folder: Path


class FakeStack:
    """What `docker` answers from, as a folder; each part can be spoilt."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "bin").mkdir()
        (folder / "bin/docker").write_text(DOCKER)
        (folder / "bin/docker").chmod(0o755)
        self.set_environment(IN_THE_STACK)
        (folder / "contents").write_text("3421; 0 16390 TABLE DATA public alembic_version cliprd\n")
        for key, content in FILES.items():
            self.artifact(key).parent.mkdir(parents=True)
            self.artifact(key).write_bytes(content)
        (folder / "artifacts/00/half.tmp").write_bytes(b"not whole yet")
        self.set_rows(list(FILES), list(FILES))

    def artifact(self, key: str) -> Path:
        return self.folder / "artifacts" / key

    def set_environment(self, environment: dict[str, str | None], service: str = "api") -> None:
        services: dict[str, object] = {name: {"environment": dict(IN_THE_STACK)} for name in ("migrate", "api", "worker")}
        services[service] = {"environment": environment}
        as_yaml = yaml.safe_dump({"name": "cliprd", "services": services})
        (self.folder / "config.yaml").write_text(as_yaml.replace("''", '""'))  # as Compose writes it

    def set_rows(self, before: list[str], after: list[str]) -> None:
        """The artifacts that the database knows before and after their files are copied."""
        for name, keys in (("rows", before), ("rows_after", after)):
            lines = sorted(f"{hashlib.sha256(FILES[key]).hexdigest()}  {key}" for key in keys)
            (self.folder / name).write_text("".join(f"{line}\n" for line in lines))

    def back_up(self) -> BackedUp:
        target = self.folder / "backup"
        environment = os.environ | {"PATH": f"{self.folder}/bin:{os.environ['PATH']}", "STACK": str(self.folder)}
        done = subprocess.run(["sh", str(SCRIPT), str(target)], env=environment, capture_output=True, text=True, check=False)
        return BackedUp(done.returncode, done.stdout + done.stderr, target)


@pytest.fixture
def stack(tmp_path: Path) -> FakeStack:
    return FakeStack(tmp_path)


def test_all_of_the_stack_s_own_is_backed_up(stack: FakeStack) -> None:
    stack.set_environment({**IN_THE_STACK, "CLIPRD_ARTIFACTS_URL": "", "CLIPRD_DATABASE_URL": None})
    backup = stack.back_up()
    assert backup.status == 0, backup.said
    assert (backup.folder / "database.dump").read_text() == "dump\n"
    with tarfile.open(backup.folder / "artifacts.tar") as archive:
        assert set(archive.getnames()) == FILES.keys()


def test_a_stack_without_artifacts_can_be_backed_up(stack: FakeStack) -> None:
    for key in FILES:
        stack.artifact(key).unlink()
    stack.set_rows([], [])
    backup = stack.back_up()
    assert backup.status == 0, backup.said


@pytest.mark.parametrize(
    "elsewhere",
    [
        {"CLIPRD_DATABASE_URL": "postgresql://cliprd:secret@db.example.org/cliprd"},
        {"CLIPRD_DATABASE_URL_FILE": "/run/secrets/own/database_url"},
        {"CLIPRD_ARTIFACTS_URL": "s3://pictures/secret"},
        {"CLIPRD_ARTIFACTS_URL_FILE": "/run/secrets/own/secret"},
    ],
)
@pytest.mark.parametrize("service", ["api", "worker"])
def test_a_database_or_a_store_elsewhere_is_refused(stack: FakeStack, elsewhere: dict[str, str | None], service: str) -> None:
    stack.set_environment(IN_THE_STACK | elsewhere, service)
    backup = stack.back_up()
    assert backup.status == 1
    assert f"the stack uses what is not its own ({next(iter(elsewhere))})" in backup.said
    assert "secret" not in backup.said
    assert not backup.folder.exists()


def test_an_empty_database_is_refused(stack: FakeStack) -> None:
    (stack.folder / "contents").write_text("; no tables\n")
    backup = stack.back_up()
    assert backup.status == 1
    assert "the database is empty" in backup.said


def test_a_file_that_is_lacking_is_told(stack: FakeStack) -> None:
    stack.artifact(FIRST).unlink()
    backup = stack.back_up()
    assert backup.status == 1
    assert f"storage_key IN ('{FIRST}')" in backup.said
    assert "lacks these artifacts" in backup.said


def test_the_columns_that_are_asked_for_exist() -> None:
    queries = re.findall(r"SELECT (.*?) FROM artifacts (?:ORDER BY|WHERE) ([^$]*?)(?: IN|\"|$)", SCRIPT.read_text(), flags=re.MULTILINE)
    assert len(queries) == 2
    columns = {word for query in queries for part in query for word in re.findall(r"[a-z_\d]+", part)}
    assert columns <= set(Artifact.__table__.columns.keys())


def test_a_file_that_is_damaged_is_told(stack: FakeStack) -> None:
    stack.artifact(FIRST).write_bytes(b"\0" * len(FILES[FIRST]))
    backup = stack.back_up()
    assert backup.status == 1
    assert f"storage_key IN ('{FIRST}')" in backup.said


def test_a_file_that_is_deleted_meanwhile_is_not_missed(stack: FakeStack) -> None:
    stack.artifact(FIRST).unlink()
    stack.set_rows(list(FILES), [key for key in FILES if key != FIRST])
    backup = stack.back_up()
    assert backup.status == 0, backup.said
