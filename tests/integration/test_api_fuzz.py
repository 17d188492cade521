"""A short round of fuzzing over HTTP, from the API's own OpenAPI: no fault, no status, header or body that it doesn't document, and nobody
let in whose key does not allow it."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import cycle

import pytest
import schemathesis
import uvicorn
from hypothesis import HealthCheck, Phase, settings
from schemathesis.checks import CHECKS, not_a_server_error

from service.app import create_app
from service.settings import Settings
from service.store import artifacts
from service.store.keys import KeyScope, create_key
from service.store.kinds import ArtifactKind
from service.store.metrics import record_evaluations, record_metrics
from tests.fuzz.keys import expected_refusal
from tests.store_helpers import claim, create, evaluated, finish, measured, write_table

EXAMPLES_PER_OPERATION = 10
TIMEOUT_SECONDS = 60.0
schemathesis.checks.load_all_checks()
WANTED = [
    not_a_server_error,
    *CHECKS.get_by_names(["status_code_conformance", "content_type_conformance", "response_schema_conformance", "negative_data_rejection"]),
]
schema = schemathesis.openapi.from_dict(create_app(Settings()).openapi())


@dataclass(frozen=True)
class Running:
    """A server with a job that has succeeded, an artifact of it, and what a spec may name."""

    url: str
    ids: dict[str, str]
    keys: Iterator[tuple[KeyScope | None, dict[str, str]]]
    """Mostly an admin's; now and then one that only reads, or none."""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("fuzz")
    write_table(folder)
    app = create_app(
        Settings(
            database_url=f"sqlite:///{folder / 'cliprd.db'}",
            broker_url="memory://",
            artifacts_root=folder / "artifacts",
            teacher_store_root=folder / "stores",
            data_root=folder,
        )
    )
    uvicorn_server = uvicorn.Server(uvicorn.Config(app, port=0, ws="none", log_level="critical"))
    thread = threading.Thread(target=uvicorn_server.run)
    thread.start()
    while not uvicorn_server.started:
        assert thread.is_alive(), "the API did not start"
        time.sleep(0.01)
    port = uvicorn_server.servers[0].sockets[0].getsockname()[1]
    services = app.state.services
    claimed = claim(services.sessions, create(services.sessions).id)
    (folder / "weights").write_bytes(b"weights")
    with services.sessions.begin() as session:
        keys = {scope: create_key(session=session, name=scope, scope=scope)[1] for scope in (KeyScope.ADMIN, KeyScope.READ)}
        held = {"session": session, "job_id": claimed.job.id, "lease_token": claimed.lease_token}
        record_metrics(**held, records=[measured(step, train_loss=1 / step) for step in range(1, 300)])
        record_evaluations(**held, records=[evaluated(10)])
        blob = services.blobs.put_file(folder / "weights")
        (artifact,) = artifacts.register_artifacts(**held, kind=ArtifactKind.MODEL, group="export", files={"weights": blob})
    finish(services.sessions, claimed)  # so that streams end
    given = [*[KeyScope.ADMIN] * 5, KeyScope.READ, None]
    headers = [(scope, {} if scope is None else {"Authorization": f"Bearer {keys[scope]}"}) for scope in given]
    yield Running(f"http://127.0.0.1:{port}", {"job_id": claimed.job.id, "artifact_id": artifact.id}, cycle(headers))
    uvicorn_server.should_exit = True
    thread.join()


@schema.parametrize()
@settings(
    max_examples=EXAMPLES_PER_OPERATION,
    deadline=None,
    derandomize=True,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)
def test_the_api_does_what_it_documents(server: Running, case: schemathesis.Case) -> None:
    for name, real in server.ids.items() if case.method != "DELETE" else ():
        given = str(case.path_parameters.get(name, ""))
        if name in case.path_parameters and len(given) % 2 == 0:  # the others stay as they were made up
            case.path_parameters[name] = real
    scope, headers = next(server.keys)
    response = case.call(base_url=server.url, headers=headers, timeout=TIMEOUT_SECONDS)
    case.validate_response(response, checks=WANTED)
    refusal = expected_refusal(case.path, case.method, scope)
    assert refusal is None or response.status_code == refusal, f"{case.method} {case.path} with a key of scope {scope}"


def test_the_round_covers_every_route() -> None:
    fuzzed = {operation.ok().label for operation in schema.get_all_operations()}
    assert {"POST /jobs", "GET /jobs/{job_id}/metrics", "GET /artifacts/{artifact_id}", "GET /metrics"} <= fuzzed
