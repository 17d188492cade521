"""The API redeployed while clients read from it."""

from __future__ import annotations

import json
import socket
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from http import HTTPStatus
from pathlib import Path
from typing import Any

import httpx

from service.client import Client, CliprdError
from service.store.states import JobState
from tests.chaos.invariants import WEIGHTS
from tests.chaos.lab import Lab
from tests.chaos.proxy import Network, Proxy
from tests.chaos.scenario import scenario
from tests.live import eventually

NUM_REDEPLOYMENTS = 2


def redeploy(lab: Lab, proxy: Proxy | None = None) -> None:
    """SIGTERM, then a new process on the same port; connections through a proxy, which buffers, break while there is none."""
    lab.stack.api.stop()
    if proxy is not None:
        proxy.set(Network.REFUSING)
    lab.stack.start_api()
    if proxy is not None:
        proxy.set(Network.WHOLE)


class SlowTransport(httpx.HTTPTransport):
    """Reads answers slowly, with hardly a buffer, and remembers which parts were asked for."""

    def __init__(self) -> None:
        super().__init__(socket_options=[(socket.SOL_SOCKET, socket.SO_RCVBUF, 64 * 1024)])
        self.ranges: list[str | None] = []
        self.num_bytes = 0

    def wait_for_bytes(self, num_requests: int) -> None:
        """Until as many downloads have begun, and the last one brought something."""
        before = self.num_bytes
        eventually(lambda: (len(self.ranges) >= num_requests and self.num_bytes > before) or None)

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        response = super().handle_request(request)
        if request.url.path.startswith("/artifacts/"):
            self.ranges.append(request.headers.get("Range"))
            assert isinstance(response.stream, httpx.SyncByteStream)
            response.stream = SlowStream(response.stream, self)
        return response


class SlowStream(httpx.SyncByteStream):
    def __init__(self, stream: httpx.SyncByteStream, transport: SlowTransport) -> None:
        self._stream = stream
        self._transport = transport

    def __iter__(self) -> Iterator[bytes]:
        for chunk in self._stream:
            self._transport.num_bytes += len(chunk)
            if len(self._transport.ranges) <= NUM_REDEPLOYMENTS:  # the last one need not be slow
                time.sleep(len(chunk) / 250_000)
            yield chunk

    def close(self) -> None:
        self._stream.close()


@scenario("api-redeployed-download", "the API is redeployed, twice, while a model is downloaded")
def api_redeployed_download(lab: Lab) -> str:
    job_id = lab.train()
    lab.finish(job_id)
    (weights,) = [artifact for artifact in lab.client.artifacts(job_id) if artifact.name == WEIGHTS]
    transport = SlowTransport()
    with ExitStack() as opened:
        proxy = opened.enter_context(Proxy(lab.stack.port))
        client = opened.enter_context(Client(f"http://127.0.0.1:{proxy.port}", api_key="", transport=transport))
        folder = opened.enter_context(tempfile.TemporaryDirectory())

        def download() -> None:
            def attempt() -> Path | None:
                try:
                    return client.download(weights, Path(folder))
                except CliprdError:  # it says: run it again to continue
                    return None

            eventually(attempt)

        thread = threading.Thread(target=download)
        thread.start()
        for number in range(1, NUM_REDEPLOYMENTS + 1):
            transport.wait_for_bytes(number)
            redeploy(lab, proxy)
        thread.join()
        assert (Path(folder) / weights.name).stat().st_size == weights.num_bytes
    resumed = [asked for asked in transport.ranges if asked is not None]
    assert transport.ranges[0] is None
    assert len(resumed) >= NUM_REDEPLOYMENTS, f"the ranges asked for are {transport.ranges}"
    assert transport.num_bytes == weights.num_bytes, f"{transport.num_bytes} bytes came in all, of {weights.num_bytes}"
    return f"{len(resumed)} times resumed by Range, no byte sent twice, SHA-256 as told"


@dataclass
class Follower:
    """A client of an event stream that comes back with the last id it saw."""

    url: str
    events: list[tuple[int, dict[str, Any]]] = field(default_factory=list)
    end: str | None = None
    num_connections: int = 0

    def run(self) -> None:
        deadline = time.monotonic() + 120
        while self.end is None and time.monotonic() < deadline:
            headers = {"Accept": "text/event-stream"}
            if self.events:
                headers["Last-Event-ID"] = str(self.events[-1][0])
            try:
                with httpx.stream("GET", self.url, headers=headers, timeout=30.0, trust_env=False) as response:
                    response.raise_for_status()
                    self.num_connections += 1
                    if response.status_code == HTTPStatus.NO_CONTENT:  # it has ended, and nothing is new
                        self.end = JobState.SUCCEEDED
                    self._read(response)
            except httpx.HTTPError:
                time.sleep(0.1)

    def _read(self, response: httpx.Response) -> None:
        fields: dict[str, str] = {}
        for line in response.iter_lines():
            name, _, value = line.partition(": ")
            if line:
                fields[name] = value
                continue
            if fields.get("event") == "end":
                self.end = json.loads(fields["data"])["state"]
            elif "id" in fields:
                self.events.append((int(fields["id"]), json.loads(fields["data"])))
            fields = {}


@scenario("api-redeployed-stream", "the API is redeployed, twice, while a job's events, log and metrics are followed")
def api_redeployed_stream(lab: Lab) -> str:
    job_id = lab.train()
    followers = {path: Follower(f"{lab.stack.url}/jobs/{job_id}/{path}") for path in ("events", "log", "metrics/stream")}
    threads = [threading.Thread(target=follower.run) for follower in followers.values()]
    for thread in threads:
        thread.start()
    for step in (5, 40):
        lab.wait_for_step(job_id, step)
        redeploy(lab)
    lab.struck(job_id)
    lab.finish(job_id)
    for thread in threads:
        thread.join()
    assert all(follower.end == JobState.SUCCEEDED for follower in followers.values()), "a stream did not end"
    assert all(follower.num_connections > 2 for follower in followers.values()), "each redeployment broke each stream"
    told = [event.model_dump(mode="json") for event in lab.client.events(job_id)]
    assert [data for _, data in followers["events"].events] == told, "no gap and no repeat"
    assert "".join(data["text"] for _, data in followers["log"].events) == lab.client.log(job_id)
    values = {data["step"]: data["values"] for _, data in followers["metrics/stream"].events}  # what came last of a step counts
    assert list(values) == list(range(1, lab.bench.num_steps + 1)), f"the steps that came are {list(values)}"
    for name, series in lab.client.metrics(job_id).items():
        points = dict(zip(series.steps, series.values, strict=True))
        assert {step: of_step[name] for step, of_step in values.items() if name in of_step} == points, f"{name} is not what was told of it"
    return f"{len(told)} events and the log came without gap or repeat, and all metrics of {len(values)} steps"
