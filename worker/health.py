"""Is this machine's worker ready? `python -m worker.health`, for the probes of containers and of Kubernetes.

The worker writes what it finds wrong with itself into the file `CLIPRD_HEALTH_FILE` every few seconds, and until when that holds. A
worker that hangs, was stopped or is gone does not write, so its file expires. This module reads it, with the standard library alone,
because probes come often and a timeout of theirs is a second or so.

Exit code 0 and `ready`, or 1 and one line that says what is wrong. With `--live` it is 0 also where waiting may help, as when the broker
or the database is away; 1 then means that the worker needs a restart.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

from worker.boot_clock import now

HEALTH_FILE_VARIABLE = "CLIPRD_HEALTH_FILE"
RESTART_SECONDS = 60.0
"""A worker that hangs, or does not consume for no reason outside it, may come round by itself for so long: Celery waits up to half of it
between two tries to reconnect."""


@dataclass(frozen=True)
class Health:
    """What a worker found out about itself."""

    checked_at: float
    """As `now` says."""
    valid_until: float
    """From when, as `now` says, this says nothing any more: by then the worker would have written again."""
    problems: tuple[str, ...]
    """What keeps it from taking jobs, or from what it does beside them for all. None: it is ready."""
    is_stuck: bool
    """Whether it has not consumed for RESTART_SECONDS although nothing outside it prevents that."""

    def write(self, path: Path) -> None:
        """Replace the file; whoever reads it sees all of it or the one before. Not synced: it means nothing after a crash."""
        temporary = path.with_name(f".{path.name}.tmp")
        temporary.write_text(json.dumps(asdict(self)))
        temporary.replace(path)

    @classmethod
    def read(cls, path: Path) -> Self:
        """Raises:
        OSError: there is no such file, or it can't be read.
        ValueError: it is no such record.
        """
        try:
            fields = json.loads(path.read_text())
            return cls(**(fields | {"problems": tuple(fields["problems"])}))
        except (TypeError, KeyError) as error:
            raise ValueError(f"{path} is not what a worker of this version writes") from error


def complaint(path: Path, *, is_about_life: bool) -> str | None:
    """What is wrong with the worker that writes to `path`, in one line; None: nothing.

    Args:
        is_about_life: Only ask whether it needs a restart.
    """
    try:
        health = Health.read(path)
    except FileNotFoundError:
        return f"no worker has written {path}: none runs here, it is starting, or its {HEALTH_FILE_VARIABLE} names another file"
    except (OSError, ValueError) as error:
        return f"the worker's health can't be read: {error}"
    age = now() - health.checked_at
    if age < 0:
        return "the worker has not reported since this machine was started again"
    if now() > health.valid_until + (RESTART_SECONDS if is_about_life else 0):
        return f"the worker has not reported for {age:.0f} s: it hangs, was stopped, or is gone"
    if is_about_life and not health.is_stuck:
        return None
    return "; ".join(health.problems) or None


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m worker.health", description="Is this machine's worker ready?")
    parser.add_argument("--live", action="store_true", help="only ask whether it needs a restart")
    is_about_life = parser.parse_args().live
    path = os.environ.get(HEALTH_FILE_VARIABLE)
    if not path:
        print(f"{HEALTH_FILE_VARIABLE} is not set; set it to the same file for the worker and for this check")
        return 1
    wrong = complaint(Path(path), is_about_life=is_about_life)
    print(("live" if is_about_life else "ready") if wrong is None else wrong)
    return 0 if wrong is None else 1


if __name__ == "__main__":
    sys.exit(main())
