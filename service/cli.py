"""The `cliprd` command."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated

import typer

from service import cli_control, cli_database, cli_stores, cli_workers
from service.cli_common import DEFAULT_URL, JobId, Url, connected, fail, json_object, key_and_value, out
from service.cli_table import print_table
from service.keys_cli import keys
from service.store.states import JobState

if TYPE_CHECKING:
    from service.client import Client
    from service.schemas import JobView

# Imported where used: service.client and service.embedded, which take longer than `cliprd --help` should.

app = typer.Typer(
    help="Distil a large CLIP into a small one: submit jobs, watch them, download what they made. A service that asks for an API key"
    " takes it from CLIPRD_API_KEY.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(cli_control.app)
app.add_typer(cli_database.app)
app.add_typer(cli_workers.app)
app.add_typer(cli_stores.app, name="stores")
app.add_typer(keys, name="keys")
WATCH_SECONDS = 1.0
ASK_NO_SERVICE = ("up", "migrate", "keys")
"""Commands that work on this machine, whatever `--url` says."""


@app.callback()
def ask(
    context: typer.Context,
    url: Annotated[str | None, typer.Option(help="Address of the service, as after the command.", show_default=False)] = None,
) -> None:
    if url is not None and context.invoked_subcommand in ASK_NO_SERVICE:
        fail(f"`{context.invoked_subcommand}` asks no service; leave --url out")


@app.command()
def up(
    home: Annotated[Path, typer.Option(envvar="CLIPRD_HOME", help="Folder of everything that stays: database, artifacts, logs.")] = Path(
        ".cliprd"
    ),
    port: Annotated[int, typer.Option(min=0, max=65_535, help="Port of the API on this machine; 0 picks a free one.")] = 8000,
    host: Annotated[str, typer.Option(help="Address to listen on; one that other machines reach needs an API key first.")] = "127.0.0.1",
) -> None:
    """Run the whole service on this machine, with nothing else to install. Ctrl-C stops it."""
    from service.embedded import EmbeddedError, EmbeddedStack

    for number in (signal.SIGINT, signal.SIGTERM):  # a shell without job control starts its background processes deaf to SIGINT
        signal.signal(number, _interrupt)
    try:
        with EmbeddedStack(home, port, host=host) as stack:
            out.print(f"cliprd is up: {stack.url} (API reference: {stack.url}/docs)")
            out.print(f"Everything is kept in {stack.home}; logs are in {stack.logs}. Stop with Ctrl-C.")
            _watch_until_interrupted(stack.watch)
            out.print("Stopping; a running job saves a checkpoint first and goes on at the next start.")
    except EmbeddedError as error:
        fail(str(error))
    except KeyboardInterrupt:  # while starting
        out.print("Stopped.")


def _interrupt(_signal: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _watch_until_interrupted(watch: Callable[[Callable[[str], None]], None]) -> None:
    try:
        while True:
            watch(lambda line: out.print(line, markup=False, soft_wrap=True))
            time.sleep(1)
    except KeyboardInterrupt:
        return


@app.command()
def submit(
    file: Annotated[Path, typer.Argument(help="Job spec, a JSON file.", exists=True, dir_okay=False, show_default=False)],
    watch: Annotated[bool, typer.Option("--watch", help="Show its progress until it ends.")] = False,
    url: Url = DEFAULT_URL,
) -> None:
    """Submit a job and print its id."""
    spec = json_object(file)
    with connected(url) as client:
        job = client.submit(spec)
        out.print(job.id, soft_wrap=True)
        if watch:
            _watch(client, job.id)


@app.command()
def check(
    file: Annotated[Path, typer.Argument(help="Job spec, a JSON file.", exists=True, dir_okay=False, show_default=False)],
    only_spec: Annotated[
        bool, typer.Option("--spec", help="Print the resolved spec alone, as `python -m cliprd_core.train` takes it.")
    ] = False,
    url: Url = DEFAULT_URL,
) -> None:
    """Check a job spec without submitting it; prints what it would become."""
    spec = json_object(file)
    with connected(url) as client:
        checked = client.check(spec).model_dump(mode="json")
    out.print_json(data=checked["spec"] if only_spec else checked)


@app.command("watch")
def watch_job(job_id: JobId, url: Url = DEFAULT_URL) -> None:
    """Show a job's progress until it ends. Exit code 0 if it succeeded, else 1."""
    with connected(url) as client:
        _watch(client, job_id)


def _watch(client: Client, job_id: str) -> None:
    from service.progress_view import ProgressView

    with ProgressView(out) as view:
        job = client.wait(job_id, poll_seconds=WATCH_SECONDS, on_poll=view.show)
    if job.error is not None:
        fail(f"{job.error.reason}: {job.error.message}\nWhat to do: {job.error.what_to_do}")
    if job.state is not JobState.SUCCEEDED:
        raise typer.Exit(1)


@app.command()
def jobs(
    state: Annotated[JobState | None, typer.Option(help="Only jobs in this state.")] = None,
    label: Annotated[list[str] | None, typer.Option(help="Only jobs with this label, as `key=value`; repeat it for several.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="Jobs to list, at most.")] = 50,
    url: Url = DEFAULT_URL,
) -> None:
    """List jobs, newest first."""
    from service.progress_view import status_of

    labels = dict(key_and_value(one) for one in label or [])
    rows: list[tuple[str, ...]] = []
    with connected(url) as client:
        for job in islice(client.jobs(state=state, labels=labels), limit):
            reason = "" if job.error is None else str(job.error.reason)
            rows.append((job.id, job.name, str(job.state), str(job.attempt), reason if job.state.is_finished else status_of(job)))
    print_table(out, rows, headings=("id", "name", "state", "attempt", "status"), ids=("id",))


@app.command()
def show(job_id: JobId, url: Url = DEFAULT_URL) -> None:
    """Show a job: its state, progress, latest evaluations and files."""
    from service.progress_view import status_of

    with connected(url) as client:
        job = client.job(job_id)
        evaluations, artifacts = client.evaluations(job_id), client.artifacts(job_id)
    rows = [
        ("id", job.id),
        ("name", job.name),
        ("recipe", job.recipe),
        ("state", str(job.state)),
        ("attempt", _attempts(job)),
    ]
    if not job.state.is_finished:
        rows.append(("status", status_of(job)))
    for name, value in job.labels.items():
        rows.append((f"label {name}", value))
    if job.error is not None:
        rows.append(("error", f"{job.error.reason}: {job.error.message}"))
        rows.append(("what to do", job.error.what_to_do))
    if job.result is not None:
        rows.append(("parameters", f"{job.result.num_student_parameters:,}"))
        rows.append(("training time", f"{job.result.train_seconds:,.0f} s"))
    print_table(out, rows, headings=("field", "value"), show_headings=False)
    last_step = max((one.step for one in evaluations), default=0)
    for one in evaluations:
        if one.step == last_step:
            values = ", ".join(f"{name} {value:.1%}" for name, value in one.metrics.items() if name in one.chance)
            out.print(f"{one.dataset} at step {one.step}: {values}", soft_wrap=True)
    for artifact in artifacts:
        out.print(f"{artifact.kind} {artifact.group}/{artifact.name}  {artifact.num_bytes:,} bytes  {artifact.id}", soft_wrap=True)


def _attempts(job: JobView) -> str:
    failed = f"; {job.failed_attempts} failed, of at most {job.max_attempts}" if job.failed_attempts else ""
    return f"{job.attempt}{failed}" if job.attempt else "not started"


@app.command()
def download(
    job_id: JobId,
    to: Annotated[Path | None, typer.Option(help="Folder to download into.  [default: the job's id]", show_default=False)] = None,
    url: Url = DEFAULT_URL,
) -> None:
    """Download the trained student, ready for open_clip."""
    folder = to or Path(job_id)
    with connected(url) as client:
        for path in client.download_model(job_id, folder):
            out.print(f"{path}  {path.stat().st_size:,} bytes", soft_wrap=True)
    out.print("\nLoad it with open_clip:\n", soft_wrap=True)
    name = f'"local-dir:{folder.resolve()}"'
    out.print(f"    model, _, preprocess = open_clip.create_model_and_transforms({name})", soft_wrap=True, markup=False)
    out.print(f"    tokenizer = open_clip.get_tokenizer({name})", soft_wrap=True, markup=False)


def main() -> None:
    """Entry point of the `cliprd` command."""
    try:
        app()
    except BrokenPipeError:  # `cliprd jobs | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
