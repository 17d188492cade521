"""Disks that are full: under the run directories, and under the artifact store. Each is a small file system of its own, in memory."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path

from service.store.kinds import EventKind
from tests.chaos.lab import Bench, Lab, SkippedError
from tests.chaos.scenario import scenario
from tests.live import eventually

DISK_BYTES = 256 * 2**20
BALLAST = "ballast"


def small_disk(name: str) -> Callable[[Bench, Path], AbstractContextManager[None]]:
    """A file system of DISK_BYTES in place of the stack's folder of that name."""

    @contextmanager
    def mounted(_bench: Bench, home: Path) -> Iterator[None]:
        folder = home / name
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(folder)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise SkippedError(f"a small disk cannot be mounted, which takes root and CAP_SYS_ADMIN ({done.stderr.strip()})")
        try:
            yield
        finally:
            subprocess.run(["umount", "--lazy", str(folder)], check=True)

    return mounted


def fill(folder: Path) -> None:
    """Leave no byte free."""
    with (folder / BALLAST).open("wb", buffering=0) as ballast:
        free = os.statvfs(folder).f_bavail * os.statvfs(folder).f_frsize
        while free:
            with suppress(OSError):  # someone was faster
                os.posix_fallocate(ballast.fileno(), os.fstat(ballast.fileno()).st_size, free)
            free = os.statvfs(folder).f_bavail * os.statvfs(folder).f_frsize


def fill_until_given_up(lab: Lab, folder: Path) -> None:
    """Let a job meet a full disk; free it once the job waits for that; and let the job go on at once, as an operator would."""
    job_id = lab.train_to_checkpoint()
    fill(folder)
    eventually(lambda: any(event.data.get("reason") == "disk_full" for event in lab.witness.told[job_id].events) or None)
    (folder / BALLAST).unlink()
    lab.client.pause(job_id)
    lab.struck(job_id)
    lab.client.resume(job_id)
    assert lab.finish(job_id).attempt == 2
    ends = [event for event in lab.client.events(job_id) if event.kind is EventKind.QUEUED and event.attempt == 1]
    assert ends[0].data["reason"] == "disk_full"


@scenario(
    "disk-full-at-checkpoint",
    "the disk of the run directories is full when a checkpoint is saved; then freed, and told to go on",
    around=small_disk("runs"),
)
def disk_full_at_checkpoint(lab: Lab) -> None:
    fill_until_given_up(lab, lab.runs)


@scenario(
    "disk-full-at-upload", "the disk of the artifact store is full until the model is uploaded; likewise", around=small_disk("artifacts")
)
def disk_full_at_upload(lab: Lab) -> None:
    fill_until_given_up(lab, lab.stack.home / "artifacts")
