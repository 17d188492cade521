"""Commands about one job that exists: its events and log; cancel, pause, resume, retry, clone, delete."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from service.cli_common import DEFAULT_URL, JobId, Url, connected, fail, json_object, key_and_value, out
from service.store.states import JobState

app = typer.Typer()


@app.command()
def events(job_id: JobId, url: Url = DEFAULT_URL) -> None:
    """List what happened to a job, oldest first."""
    with connected(url) as client:
        for event in client.events(job_id):
            data = ", ".join(f"{name} {value if isinstance(value, str) else json.dumps(value)}" for name, value in event.data.items())
            time = event.time.astimezone()
            out.print(f"{time:%Y-%m-%d %H:%M:%S}  attempt {event.attempt}  {event.kind}  {data}".rstrip(), markup=False, soft_wrap=True)


@app.command()
def log(
    job_id: JobId,
    tail: Annotated[int | None, typer.Option(min=1, help="Only the last lines, as many.", show_default=False)] = None,
    follow: Annotated[bool, typer.Option("--follow", help="Go on as it is printed, until the job ends.")] = False,
    url: Url = DEFAULT_URL,
) -> None:
    """Show what a job's training processes printed."""
    with connected(url) as client:
        for text in client.follow_log(job_id, tail=tail) if follow else [client.log(job_id, tail=tail)]:
            out.print(text, end="", markup=False, soft_wrap=True)


@app.command()
def cancel(
    job_id: Annotated[str | None, typer.Argument(help="Id of the job, in full.", show_default=False)] = None,
    label: Annotated[list[str] | None, typer.Option(help="Instead: all jobs with this label, as `key=value`; repeatable.")] = None,
    url: Url = DEFAULT_URL,
) -> None:
    """Cancel a job, or all with some labels. A running one is asked to stop, and does so soon."""
    if (job_id is None) == (not label):
        fail("name either a job or at least one --label")
    with connected(url) as client:
        if job_id is not None:
            job = client.cancel(job_id)
            out.print("cancelled" if job.state is JobState.CANCELLED else "its worker was asked to stop it")
            return
        answer = client.cancel_all(dict(key_and_value(one) for one in label or []))
    for one in answer.cancelled:
        out.print(f"{one}  cancelled", soft_wrap=True)
    for one in answer.requested:
        out.print(f"{one}  its worker was asked to stop it", soft_wrap=True)
    if not (answer.cancelled or answer.requested):
        out.print("no unfinished job has these labels")


@app.command()
def pause(job_id: JobId, url: Url = DEFAULT_URL) -> None:
    """Pause a job. A running one saves a checkpoint first and frees its worker."""
    with connected(url) as client:
        job = client.pause(job_id)
    out.print("paused" if job.state is JobState.PAUSED else "its worker was asked to pause it")


@app.command()
def resume(job_id: JobId, url: Url = DEFAULT_URL) -> None:
    """Let a paused job go on from its newest checkpoint."""
    with connected(url) as client:
        out.print(str(client.resume(job_id).state))


@app.command()
def retry(job_id: JobId, url: Url = DEFAULT_URL) -> None:
    """Try a failed or cancelled job again, from its newest checkpoint."""
    with connected(url) as client:
        out.print(str(client.retry(job_id).state))


@app.command()
def clone(
    job_id: JobId,
    overrides: Annotated[Path | None, typer.Option(help="JSON file of the fields to replace.", exists=True, dir_okay=False)] = None,
    url: Url = DEFAULT_URL,
) -> None:
    """Submit a new job like this one, some fields replaced, and print its id."""
    replaced = {} if overrides is None else json_object(overrides)
    with connected(url) as client:
        out.print(client.clone(job_id, replaced).id, soft_wrap=True)


@app.command()
def delete(job_id: JobId, url: Url = DEFAULT_URL) -> None:
    """Delete a finished job with its files."""
    with connected(url) as client:
        client.delete(job_id)
    out.print("deleted")
