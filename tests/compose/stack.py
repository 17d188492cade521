"""A compose stack under test: a copy of the repository, `docker compose` in it, and the API by curl."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

REPOSITORY = Path(__file__).parents[2]
FILES = ("docker-compose.yml", "docker-compose.cpu.yml")
WAIT_SECONDS = 900.0
Found = TypeVar("Found")


class Stack:
    """Containers of a project of their own, with a port and image tags of their own.

    Args:
        folder: Becomes a copy of the repository's files, as a fresh clone would hold.
    """

    def __init__(self, folder: Path, project: str) -> None:
        self.folder = folder
        self.project = project
        self.key = ""
        self.tag = project
        self._port = free_port()
        copy_repository(folder)

    @property
    def environment(self) -> dict[str, str]:
        """What `docker compose` and the scripts run with."""
        ours = {name: value for name, value in os.environ.items() if not name.startswith("CLIPRD_")}
        return ours | {
            "COMPOSE_PROJECT_NAME": self.project,
            "COMPOSE_FILE": ":".join(FILES),
            "DOCKER_BUILDKIT": "1",
            "CLIPRD_TAG": self.tag,
            "CLIPRD_LISTEN": f"127.0.0.1:{self._port}",
        }

    def run(self, *command: str) -> str:
        """What a command prints on standard output; all that it printed, and the end of the test, if it fails."""
        done = subprocess.run(command, cwd=self.folder, env=self.environment, capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(f"`{' '.join(command)}` ended with {done.returncode}\n{done.stdout}\n{done.stderr}")
        return done.stdout

    def compose(self, *arguments: str) -> str:
        return self.run("docker", "compose", *arguments)

    def up(self, *, workers: int = 1) -> None:
        self.compose("up", "--detach", "--wait", "--scale", f"worker={workers}")

    def containers(self, service: str) -> list[str]:
        """Ids of a service's running containers."""
        return self.compose("ps", "--quiet", service).split()

    def curl(self, path: str, *options: str) -> str:
        """The body of a successful answer."""
        headers = ("--header", f"Authorization: Bearer {self.key}") if self.key else ()
        return self.run("curl", "--silent", "--show-error", "--fail-with-body", *headers, *options, f"http://127.0.0.1:{self._port}{path}")

    def status(self, path: str) -> int:
        """The status of an answer to a request without a key."""
        return int(
            self.run("curl", "--silent", "--output", "/dev/null", "--write-out", "%{http_code}", f"http://127.0.0.1:{self._port}{path}")
        )

    def get(self, path: str) -> Any:
        return json.loads(self.curl(path))

    def submit(self, **training: Any) -> str:
        """The emoji example's student, trained in another way; the job's id."""
        spec = json.loads((self.folder / "examples/emoji/student_alone.json").read_text())
        spec["training"] |= {"warmup_steps": 5, **training}
        spec["evaluation"]["every_epochs"] = 1000
        (self.folder / "spec.json").write_text(json.dumps(spec))
        options = ("--header", "Content-Type: application/json", "--data", "@spec.json")
        return str(json.loads(self.curl("/jobs", *options))["id"])

    def wait(self, job_id: str, what: str, is_so: Callable[[Any], bool]) -> Any:
        """The job, once `is_so` of it."""

        def look() -> Any:
            job = self.get(f"/jobs/{job_id}")
            if is_so(job):
                return job
            if job["state"] in ("succeeded", "failed", "cancelled"):
                sys.exit(f"{what}: the job ended before: {job['state']}, {job['error']}")
            return None

        return eventually(look, what)

    def succeeded(self, job_id: str) -> Any:
        return self.wait(job_id, "the job succeeds", lambda job: job["state"] == "succeeded")

    def sql(self, query: str) -> str:
        return self.compose(
            "exec", "-T", "postgres", "psql", "--username=cliprd", "--tuples-only", "--no-align", f"--command={query}"
        ).strip()


def copy_repository(folder: Path) -> None:
    """The tracked files, as they are now, and those that would be."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=REPOSITORY, capture_output=True, text=True, check=True
    ).stdout
    for name in filter(None, listed.split("\0")):
        if (REPOSITORY / name).is_file():
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(REPOSITORY / name, target)


def eventually(look: Callable[[], Found | None], what: str) -> Found:
    """What `look` finds, once it finds something."""
    deadline = time.monotonic() + WAIT_SECONDS
    while (found := look()) is None:
        if time.monotonic() > deadline:
            sys.exit(f"{what}: not within {WAIT_SECONDS:.0f} s")
        time.sleep(0.5)
    return found


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def step(what: str) -> Iterator[None]:
    """Say what happens, and how long it took."""
    print(f"{what} … ", end="", flush=True)
    started = time.monotonic()
    yield
    print(f"{time.monotonic() - started:.0f} s", flush=True)


def check(is_so: bool, otherwise: str) -> None:
    if not is_so:
        sys.exit(f"wrong: {otherwise}")
