"""A typed Python client of the API.

with Client("http://127.0.0.1:8000") as client:
    job = client.submit({"name": "…", …})
    job = client.wait(job.id)
    client.download_model(job.id, Path("student"))
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from http import HTTPStatus
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import httpx
from pydantic import BaseModel, ValidationError

from cliprd_core.spec import JobSpec
from service.client_streams import follow
from service.dry_run_schemas import DryRunView
from service.errors import Problem
from service.schemas import (
    ArtifactList,
    ArtifactView,
    CancelledJobs,
    EvaluationList,
    EvaluationView,
    EventList,
    EventView,
    JobList,
    JobView,
    MetricsView,
    SeriesView,
)
from service.store.kinds import ArtifactKind
from service.store.states import JobState
from service.teacher_store_schemas import TeacherStoreList, TeacherStoreView
from service.worker_schemas import WorkerList, WorkerView

API_KEY_VARIABLE = "CLIPRD_API_KEY"
TIMEOUT_SECONDS = 30.0
PAGE_SIZE = 100
NUM_DOWNLOAD_ATTEMPTS = 5
PATIENCE_SECONDS = 120.0
"""How long `wait` bears a service that does not answer."""

AnyView = TypeVar("AnyView", bound=BaseModel)
AnyPage = TypeVar("AnyPage", JobList, EvaluationList, ArtifactList)


class CliprdError(Exception):
    """The service refused, failed or could not be reached; the message says what to do, as far as that is known.

    Attributes:
        problem: The service's own answer, where there was one.
    """

    def __init__(self, message: str, problem: Problem | None = None) -> None:
        super().__init__(message)
        self.problem = problem


class UnreachableError(CliprdError):
    """Nothing answers at the service's address."""


class Client:
    """One connection pool to one service. Every method raises CliprdError if the service does not do as asked.

    Args:
        url: Where the API is, as `http://127.0.0.1:8000`.
        api_key: Sent with every request. Left out: the environment's CLIPRD_API_KEY, if it is set.
        transport: For tests: replaces the network.
    """

    def __init__(self, url: str, *, api_key: str | None = None, transport: httpx.BaseTransport | None = None) -> None:
        self.url = url.rstrip("/")
        key = (api_key if api_key is not None else os.environ.get(API_KEY_VARIABLE, "")).strip()
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        # Proxies of the environment are for the internet; a service on this machine would not be found through one.
        is_remote = not _is_local(self.url)
        self._http = httpx.Client(base_url=self.url, timeout=TIMEOUT_SECONDS, headers=headers, transport=transport, trust_env=is_remote)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        self._http.close()

    def submit(self, spec: JobSpec | Mapping[str, Any], *, idempotency_key: str | None = None) -> JobView:
        """Submit a job; the service checks the spec, which may leave out whatever has a default.

        Repeated with the same `idempotency_key`, such as `str(uuid.uuid4())`, it returns the job that the first call made.
        """
        body = spec.model_dump(mode="json") if isinstance(spec, JobSpec) else dict(spec)
        headers = {} if idempotency_key is None else {"Idempotency-Key": idempotency_key}
        return self._call("POST", "/jobs", JobView, json=body, headers=headers)

    def check(self, spec: JobSpec | Mapping[str, Any]) -> DryRunView:
        """What a spec would become as a job; nothing is submitted."""
        body = spec.model_dump(mode="json") if isinstance(spec, JobSpec) else dict(spec)
        return self._call("POST", "/jobs", DryRunView, json=body, params={"dry_run": True})

    def job(self, job_id: str) -> JobView:
        return self._call("GET", f"/jobs/{job_id}", JobView)

    def jobs(self, *, state: JobState | None = None, labels: Mapping[str, str] | None = None) -> Iterator[JobView]:
        """All jobs that match, newest first, fetched page by page."""
        params: dict[str, Any] = {"limit": PAGE_SIZE}
        if state is not None:
            params["state"] = state.value
        if labels:
            params["label"] = [f"{key}={value}" for key, value in labels.items()]
        for page in self._pages("/jobs", JobList, params):
            yield from page.jobs

    def cancel(self, job_id: str) -> JobView:
        """Ask for a job's end. A running one is stopped by its worker soon after."""
        return self._call("POST", f"/jobs/{job_id}/cancel", JobView)

    def pause(self, job_id: str) -> JobView:
        """Put a job aside. A running one saves a checkpoint first, soon after."""
        return self._call("POST", f"/jobs/{job_id}/pause", JobView)

    def resume(self, job_id: str) -> JobView:
        """Let a paused job go on from its newest checkpoint."""
        return self._call("POST", f"/jobs/{job_id}/resume", JobView)

    def cancel_all(self, labels: Mapping[str, str]) -> CancelledJobs:
        """Cancel every unfinished job that carries all of these labels."""
        return self._call("POST", "/jobs/cancel", CancelledJobs, json={"labels": dict(labels)})

    def retry(self, job_id: str) -> JobView:
        """Try a failed or cancelled job again, from its newest checkpoint."""
        return self._call("POST", f"/jobs/{job_id}/retry", JobView)

    def clone(self, job_id: str, overrides: Mapping[str, Any] | None = None) -> JobView:
        """Submit a new job from this one's spec, with some fields replaced, object by object."""
        return self._call("POST", f"/jobs/{job_id}/clone", JobView, json=dict(overrides or {}))

    def delete(self, job_id: str) -> None:
        """Forget a finished job, its artifacts included."""
        self._request("DELETE", f"/jobs/{job_id}")

    def events(self, job_id: str, *, after: int = 0) -> Iterator[EventView]:
        """What happened to the job so far, oldest first."""
        while page := self._call("GET", f"/jobs/{job_id}/events", EventList, params={"after": after, "limit": PAGE_SIZE}).events:
            yield from page
            after = page[-1].id

    def log(self, job_id: str, *, tail: int | None = None) -> str:
        """What the job's training processes printed, or the last lines of it."""
        return self._request("GET", f"/jobs/{job_id}/log", params={} if tail is None else {"tail": tail}).text

    def follow_log(self, job_id: str, *, tail: int | None = None) -> Iterator[str]:
        """The log as it is printed, piece by piece, until the job ends. A service that restarts meanwhile is waited for, as by `wait`."""
        params = {} if tail is None else {"tail": tail}
        try:
            for one in follow(self._http, f"/jobs/{job_id}/log", params, patience_seconds=PATIENCE_SECONDS, error_of=_error_of):
                yield json.loads(one.data).get("text", "")
        except httpx.TransportError as error:
            raise UnreachableError(f"the stream from {self.url} broke off ({error})") from error

    def metrics(self, job_id: str, names: list[str] | None = None, *, since_step: int = 0) -> dict[str, SeriesView]:
        """Metric series by name; `names` may end in `*`. None: all."""
        params: dict[str, Any] = {"since_step": since_step}
        if names is not None:
            params["names"] = names
        return self._call("GET", f"/jobs/{job_id}/metrics", MetricsView, params=params).series

    def evaluations(self, job_id: str) -> list[EvaluationView]:
        """What was evaluated, by step; values are fractions 0-1."""
        return [one for page in self._pages(f"/jobs/{job_id}/evaluations", EvaluationList, {}) for one in page.evaluations]

    def artifacts(self, job_id: str, kind: ArtifactKind | None = None) -> list[ArtifactView]:
        """The job's files, newest first."""
        params: dict[str, Any] = {"limit": PAGE_SIZE}
        if kind is not None:
            params["kind"] = kind.value
        return [one for page in self._pages(f"/jobs/{job_id}/artifacts", ArtifactList, params) for one in page.artifacts]

    def workers(self) -> list[WorkerView]:
        """All workers that report to the service, by machine."""
        return self._call("GET", "/workers", WorkerList).workers

    def teacher_stores(self) -> list[TeacherStoreView]:
        """All teacher stores that the service sees, most recently used first."""
        return self._call("GET", "/teacher-stores", TeacherStoreList).teacher_stores

    def delete_teacher_store(self, key: str) -> None:
        """Delete a teacher store; one that is in use is refused."""
        self._request("DELETE", f"/teacher-stores/{key}")

    def wait(self, job_id: str, *, poll_seconds: float = 1.0, on_poll: Callable[[JobView], None] | None = None) -> JobView:
        """Wait until the job has finished, whichever way; `on_poll` sees it each time it is looked at.

        A service that restarts meanwhile is waited for, up to `PATIENCE_SECONDS`.
        """
        last_seen = float("-inf")
        while True:
            try:
                job = self.job(job_id)
            except UnreachableError:
                if time.monotonic() - last_seen > PATIENCE_SECONDS:
                    raise
            else:
                last_seen = time.monotonic()
                if on_poll is not None:
                    on_poll(job)
                if job.state.is_finished:
                    return job
            time.sleep(poll_seconds)

    def download_model(self, job_id: str, folder: Path) -> list[Path]:
        """Download all files of the trained student into `folder`, which open_clip can then load as `local-dir:FOLDER`."""
        artifacts = self.artifacts(job_id, ArtifactKind.MODEL)
        if not artifacts:
            raise CliprdError(f"job {job_id} has no model; only a succeeded job has (it is {self.job(job_id).state})")
        return [self.download(artifact, folder) for artifact in sorted(artifacts, key=lambda artifact: artifact.name)]

    def download(self, artifact: ArtifactView, folder: Path) -> Path:
        """Download one file into `folder` and check its SHA-256. A download that broke off is continued, now or the next time."""
        folder.mkdir(parents=True, exist_ok=True)
        target = folder / Path(artifact.name).name  # never outside the folder, whatever the service says
        partial = target.with_name(f".{target.name}.{artifact.sha256[:16]}.partial")
        for attempt in range(1, NUM_DOWNLOAD_ATTEMPTS + 1):
            try:
                self._fetch(artifact, partial)
            except httpx.TransportError as error:
                if attempt == NUM_DOWNLOAD_ATTEMPTS:
                    raise CliprdError(f"{artifact.name}: the download broke off ({error}); run it again to continue it") from error
                time.sleep(0.2 * attempt)
                continue
            break
        if _sha256(partial) != artifact.sha256:
            partial.unlink()
            raise CliprdError(f"{artifact.name}: what arrived is not what was stored (SHA-256 differs); download it again")
        partial.replace(target)
        return target

    def _fetch(self, artifact: ArtifactView, partial: Path) -> None:
        """Append to `partial` what it lacks."""
        have = partial.stat().st_size if partial.exists() else 0
        if have == artifact.num_bytes and partial.exists():
            return
        headers = {"Accept-Encoding": "identity"}
        if 0 < have < artifact.num_bytes:
            headers |= {"Range": f"bytes={have}-", "If-Range": f'"{artifact.sha256}"'}
        with self._http.stream("GET", f"/artifacts/{artifact.id}", headers=headers) as response:
            if response.is_error:
                response.read()
                raise _error_of(response)
            mode = "ab" if response.status_code == HTTPStatus.PARTIAL_CONTENT else "wb"
            with partial.open(mode) as file:
                for chunk in response.iter_bytes():  # as they arrive: larger chunks would be lost where the connection breaks
                    file.write(chunk)

    def _pages(self, path: str, view: type[AnyPage], params: Mapping[str, Any]) -> Iterator[AnyPage]:
        """All pages of a list, each asked for when it is needed."""
        cursor: dict[str, str] = {}
        while True:
            page = self._call("GET", path, view, params={**params, **cursor})
            yield page
            if page.next_cursor is None:
                return
            cursor = {"cursor": page.next_cursor}

    def _call(self, method: str, path: str, view: type[AnyView], **arguments: Any) -> AnyView:
        response = self._request(method, path, **arguments)
        try:
            return view.model_validate_json(response.content)
        except ValidationError as error:
            raise CliprdError(f"{self.url} answers, but not as cliprd does; check the address") from error

    def _request(self, method: str, path: str, **arguments: Any) -> httpx.Response:
        try:
            response = self._http.request(method, path, **arguments)
        except httpx.TransportError as error:
            message = f"no answer from {self.url} ({error}); is the service running there? `cliprd up` starts one on this machine"
            raise UnreachableError(message) from error
        if response.is_error:
            raise _error_of(response)
        return response


def _error_of(response: httpx.Response) -> CliprdError:
    """The service's problem in words: each field on a line of its own, with what to do."""
    try:
        problem = Problem.model_validate_json(response.content)
    except ValidationError:
        return CliprdError(f"{response.request.url} answered with status {response.status_code}")
    lines = [f"  {one.field}: {one.problem}. {one.remedy}" for one in problem.errors]
    return CliprdError("\n".join([f"{problem.title}: {problem.detail}", *lines]), problem)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _is_local(url: str) -> bool:
    return httpx.URL(url).host in ("127.0.0.1", "localhost", "::1")
