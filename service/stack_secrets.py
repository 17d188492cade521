"""`python -m service.stack_secrets`: makes the passwords of a stack's own PostgreSQL and Redis, in one folder for each who needs them.

Run once before the other containers start (docker-compose.yml). What is there stays, so that a later start finds the passwords that the
database was made with. The files can be read by every user of the containers that mount them: PostgreSQL, Redis and cliprd run as different
ones, and none as root. Each container mounts its own folder alone.
"""

from __future__ import annotations

import argparse
import os
import secrets
from pathlib import Path

from cliprd_core.run_dir import write_atomically

PASSWORD_BYTES = 32


def make_secrets(*, postgres: Path, redis: Path, cliprd: Path, postgres_host: str = "postgres", redis_host: str = "redis") -> None:
    """Write what is missing.

    Args:
        postgres: Folder of `password`, for POSTGRES_PASSWORD_FILE.
        redis: Folder of `password`, and of `redis.conf`, which sets it.
        cliprd: Folder of `database_url` and `broker_url`, for CLIPRD_DATABASE_URL_FILE and CLIPRD_BROKER_URL_FILE.
        postgres_host: Where cliprd finds PostgreSQL; its user and database are both called `cliprd`.
        redis_host: Where cliprd finds Redis.
    """
    database_password = _kept_or_made(postgres / "password")
    broker_password = _kept_or_made(redis / "password")
    _write(redis / "redis.conf", f"requirepass {broker_password}\n")
    _write(cliprd / "database_url", f"postgresql://cliprd:{database_password}@{postgres_host}/cliprd\n")
    _write(cliprd / "broker_url", f"redis://:{broker_password}@{redis_host}:6379/0\n")


def _kept_or_made(file: Path) -> str:
    """The password in `file`, made if there is none; its characters need no quoting in an address."""
    if not file.exists():
        _write(file, secrets.token_urlsafe(PASSWORD_BYTES))
    return file.read_text().strip()


def _write(file: Path, text: str) -> None:
    write_atomically(file, text)
    file.chmod(0o444)


def main() -> None:
    os.umask(0o022)
    parser = argparse.ArgumentParser(prog="python -m service.stack_secrets", description="Make the passwords of PostgreSQL and Redis.")
    for name in ("postgres", "redis", "cliprd"):
        parser.add_argument(f"--{name}", type=Path, required=True, metavar="FOLDER", help=f"folder of the files for {name}")
    folders = parser.parse_args()
    make_secrets(postgres=folders.postgres, redis=folders.redis, cliprd=folders.cliprd)


if __name__ == "__main__":
    main()
