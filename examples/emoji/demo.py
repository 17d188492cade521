"""End to end on one machine: a teacher, a small student alone, and the same student distilled from the teacher by CLIP-RD.

    python examples/emoji/demo.py

Starts the embedded service in a temporary folder, submits three jobs over REST, shows how they go, compares what they learned on a
drawing style that none was trained on, and loads the distilled student with plain open_clip. Nothing keeps running afterwards.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path
from types import FrameType
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from service.client import Client, CliprdError
from service.embedded import EmbeddedError, EmbeddedStack
from service.progress_view import ProgressView, duration
from service.schemas import EvaluationView, JobView
from service.store.states import JobState

EXAMPLE = Path(__file__).resolve().parent
REPOSITORY = EXAMPLE.parents[1]
STUDENT_FOLDER = REPOSITORY / "build" / "demo" / "student"
PICTURE_KEY = "twemoji_1f353"
POLL_SECONDS = 0.5
CLASSIFICATION, RETRIEVAL = "emoji_twemoji", "emoji_twemoji_retrieval"
COLUMNS = [
    (CLASSIFICATION, "zero_shot_top1", "zero-\nshot\ntop-1"),
    (CLASSIFICATION, "zero_shot_top5", "zero-\nshot\ntop-5"),
    (RETRIEVAL, "image_to_text_R@1", "image\n→text\nR@1"),
    (RETRIEVAL, "image_to_text_R@5", "image\n→text\nR@5"),
    (RETRIEVAL, "text_to_image_R@1", "text\n→image\nR@1"),
    (RETRIEVAL, "text_to_image_R@5", "text\n→image\nR@5"),
]
TIMES_CHANCE_CLAIMED = 100

console = Console(highlight=False)


def main() -> int:
    """Run the demo; returns the exit code."""
    os.chdir(REPOSITORY)  # the specs' paths start here
    signal.signal(signal.SIGTERM, interrupt)
    home = Path(tempfile.mkdtemp(prefix="cliprd-demo-"))
    try:
        with EmbeddedStack(home, port=0) as stack, Client(stack.url) as client:
            console.print(f"The service runs at {stack.url} for as long as this demo; its logs are in {stack.logs}", soft_wrap=True)
            is_good = run(stack, client)
    except KeyboardInterrupt:
        shutil.rmtree(home)
        console.print("\nStopped; nothing is left running.")
        return 130
    except (CliprdError, EmbeddedError) as error:
        console.print(f"The demo failed: {error}", style="red", markup=False, soft_wrap=True)
        console.print(f"What happened is in {home}", soft_wrap=True)
        return 1
    if not is_good:
        console.print(f"What happened is in {home}", soft_wrap=True)
        return 1
    shutil.rmtree(home)
    return 0


def interrupt(_signal: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def run(stack: EmbeddedStack, client: Client) -> bool:
    """Submit, wait, compare, load; False if a job did not succeed, or the distilled student is not what is claimed of it."""
    started = time.monotonic()
    submitted = submit_all(client)
    jobs = wait_for_all(stack, client, submitted)
    failed = [job for job in jobs if job.state is not JobState.SUCCEEDED]
    for job in failed:
        why = "" if job.error is None else f": {job.error.reason}: {job.error.message}"
        console.print(f"{job.name} ended as {job.state}{why}", style="red", markup=False, soft_wrap=True)
    if failed:
        return False
    console.print(f"All three jobs succeeded in {duration(time.monotonic() - started)}.\n")
    is_as_claimed = compare(client, jobs)
    show_student(client, jobs[-1])
    return is_as_claimed


def submit_all(client: Client) -> list[JobView]:
    """Teacher, student alone, student distilled. The last one waits until its teacher has been trained."""
    teacher = client.submit(read_spec("teacher.json"))
    alone = client.submit(read_spec("student_alone.json"))
    distilled = client.submit(read_spec("student_clip_rd.json") | {"teacher": {"job": teacher.id}})
    return [teacher, alone, distilled]


def read_spec(name: str) -> dict[str, Any]:
    spec: dict[str, Any] = json.loads((EXAMPLE / name).read_text())
    return spec


def wait_for_all(stack: EmbeddedStack, client: Client, jobs: list[JobView]) -> list[JobView]:
    with ProgressView(console) as view:
        while True:
            jobs = [client.job(job.id) for job in jobs]
            for job in jobs:
                view.show(job)
            if all(job.state.is_finished for job in jobs):
                return jobs
            stack.watch(console.print)
            time.sleep(POLL_SECONDS)


def compare(client: Client, jobs: list[JobView]) -> bool:
    """Show the table; returns whether the distilled student keeps what is claimed of it."""
    last = [final_evaluations(client, job) for job in jobs]
    chance = {(dataset, metric): last[0][dataset].chance[metric] for dataset, metric, _ in COLUMNS}
    titles = ["", "para-\nmeters", *(title for *_, title in COLUMNS)]
    table = Table(*titles, title="On a drawing style that none of them was trained on (Twemoji)", title_justify="left", box=box.SIMPLE_HEAD)
    for column in table.columns[1:]:
        column.justify = "right"
    for job, evaluations in zip(jobs, last, strict=True):
        assert job.result is not None
        values = [evaluations[dataset].metrics[metric] for dataset, metric, _ in COLUMNS]
        table.add_row(
            job.name.removeprefix("emoji "), f"{job.result.num_student_parameters / 1e6:.1f} M", *(f"{value:.1%}" for value in values)
        )
    table.add_section()
    table.add_row("chance", "", *(f"{value:.2%}" for value in chance.values()), style="dim")
    console.print(table)
    top1 = (CLASSIFICATION, "zero_shot_top1")
    alone, distilled = (evaluations[top1[0]].metrics[top1[1]] for evaluations in last[1:])
    times_chance = distilled / chance[top1]
    is_far_above_chance, is_above_alone = times_chance >= TIMES_CHANCE_CLAIMED, distilled > alone
    verdicts = {True: "yes", False: "NO"}
    console.print(
        f"Is the distilled student at least {TIMES_CHANCE_CLAIMED} times chance?  {verdicts[is_far_above_chance]}: {times_chance:.0f} times"
    )
    comparison = f"{distilled:.1%} against {alone:.1%} top-1"
    console.print(f"Is it better than the same student trained alone?  {verdicts[is_above_alone]}: {comparison}\n")
    return is_far_above_chance and is_above_alone


def final_evaluations(client: Client, job: JobView) -> dict[str, EvaluationView]:
    """The job's last evaluation of each of the two data sets."""
    by_step = sorted(client.evaluations(job.id), key=lambda evaluation: evaluation.step)
    return {one.dataset: one for one in by_step if one.dataset in (CLASSIFICATION, RETRIEVAL)}


def show_student(client: Client, job: JobView) -> None:
    """Download the student and let plain open_clip, in a process without cliprd, classify one picture with it."""
    shutil.rmtree(STUDENT_FOLDER, ignore_errors=True)
    client.download_model(job.id, STUDENT_FOLDER)
    console.print(f'The distilled student is in {STUDENT_FOLDER}; load it with open_clip as "local-dir:{STUDENT_FOLDER}".', soft_wrap=True)
    picture, caption = take_picture(STUDENT_FOLDER.parent)
    console.print(f"It takes {picture} (in truth: {caption}) for:", soft_wrap=True)
    command = [sys.executable, str(EXAMPLE / "classify.py"), str(STUDENT_FOLDER), str(picture)]
    said = subprocess.run(command, capture_output=True, text=True, check=False)
    if said.returncode != 0:
        raise CliprdError(f"open_clip could not use the student:\n{said.stderr}")
    console.print(said.stdout, markup=False)


def take_picture(folder: Path) -> tuple[Path, str]:
    """One test picture and its first caption, taken out of the test set's shard."""
    with tarfile.open(EXAMPLE / "wds" / CLASSIFICATION / "test" / "0.tar") as shard:
        image, text = (shard.extractfile(f"{PICTURE_KEY}.{suffix}") for suffix in ("png", "txt"))
        assert image is not None
        assert text is not None
        picture = folder / f"{PICTURE_KEY}.png"
        picture.write_bytes(image.read())
        return picture, text.read().decode().splitlines()[0]


if __name__ == "__main__":
    sys.exit(main())
