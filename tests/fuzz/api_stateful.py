"""`make fuzz`: long random walks through the API, along the links of its OpenAPI, while workers take the jobs.

The service is a process of its own on PostgreSQL and Redis. No answer may be a fault, or of a status, type or shape that the API doesn't
document, and nobody may be let in whose key does not allow it. Findings are collected, so that one round tells all of them.
CLIPRD_FUZZ_CASES sets the number of requests.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.errors import Unsatisfiable
from pydantic import ValidationError
from schemathesis.checks import CHECKS, not_a_server_error
from schemathesis.core.failures import FailureGroup
from schemathesis.core.transport import Response
from schemathesis.generation.modes import GenerationMode
from sqlalchemy.orm import Session, sessionmaker

from cliprd_core.spec import JobSpec
from service.app import create_app
from service.settings import Settings
from service.store.keys import KeyScope, create_key
from service.store.session import make_engine, make_sessions, migrate
from tests.fuzz.keys import expected_refusal
from tests.fuzz.simulated_worker import SimulatedWorker
from tests.store_helpers import CONFIG_KEYS, ODD_VALUES, TINY_CONFIG, claim, create, finish, spec_dict, write_table
from tests.teacher_store_helpers import make_store

NUM_CASES = int(os.environ.get("CLIPRD_FUZZ_CASES", "10000"))
SCENARIOS_PER_ROUND = 10
STEPS_PER_SCENARIO = 30
START_SECONDS = 60.0
NUM_RECENT = 10
NUM_CASES_TO_MEET_ALL = 5000
"""Of fewer requests none can be expected to meet everything in `WALKED`."""
KEY_SHARES = {KeyScope.ADMIN: 0.85, KeyScope.READ: 0.1, None: 0.05}
"""How many of the requests come with a key of which scope, or without."""
STREAMED = ("GET /jobs/{job_id}/events", "GET /jobs/{job_id}/log")

schemathesis.checks.load_all_checks()
[negative_data_rejection] = CHECKS.get_by_names(["negative_data_rejection"])
ALLOWED_ONLY = CHECKS.get_by_names(["use_after_free", "ensure_resource_availability"])
"""Checks that take a refused request for one that found something, or nothing."""
WANTED = [
    negative_data_rejection,
    not_a_server_error,
    *CHECKS.get_by_names(
        ["status_code_conformance", "content_type_conformance", "response_headers_conformance", "response_schema_conformance"]
    ),
    *ALLOWED_ONLY,
]
ROUND = settings(
    max_examples=SCENARIOS_PER_ROUND,
    stateful_step_count=STEPS_PER_SCENARIO,
    deadline=None,
    derandomize=False,  # unlike what `make test` draws
    database=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)
WALKED = {
    "GET /jobs": {200, 401},
    "POST /jobs": {201, 401, 403, 422},
    "GET /jobs/{job_id}": {200},
    "POST /jobs/{job_id}/pause": {200, 202, 409},
    "POST /jobs/{job_id}/resume": {200, 409},
    "POST /jobs/{job_id}/cancel": {200, 202, 409},
    "POST /jobs/{job_id}/retry": {200, 409},
    "POST /jobs/{job_id}/clone": {201},
    "DELETE /jobs/{job_id}": {204, 409},
    "GET /jobs/{job_id}/events": {200},
    "GET /jobs/{job_id}/log": {200},
    "GET /jobs/{job_id}/metrics": {200},
    "GET /jobs/{job_id}/metrics/stream": {200},
    "GET /jobs/{job_id}/artifacts": {200},
    "GET /artifacts/{artifact_id}": {200},
    "DELETE /teacher-stores/{key}": {204},
}
"""Statuses that a long round must have met, or it did not go where it should."""


@dataclass
class Service:
    """A running service, and what was seen of it."""

    url: str
    keys: dict[KeyScope, str]
    folder: Path
    finished_job: str
    """Its streams end."""
    workers: list[SimulatedWorker]
    statuses: dict[str, Counter[int]] = field(default_factory=lambda: defaultdict(Counter))
    findings: dict[str, str] = field(default_factory=dict)
    """By operation and kind: the first of its kind, with the request."""
    num_findings: Counter[str] = field(default_factory=Counter)
    ids: dict[str, list[str]] = field(default_factory=lambda: {"job_id": [], "artifact_id": []})
    """What was made, by the name of the path parameter that takes it, oldest first."""
    random: Random = field(default_factory=lambda: Random(0))
    scope: KeyScope | None = None
    """Of the key of the request that is under way."""

    @property
    def num_cases(self) -> int:
        return sum(counter.total() for counter in self.statuses.values())

    def prepare(self, case: schemathesis.Case) -> None:
        """Make of what was made up at random, and would nearly always be refused, something that gets further; half the time."""
        label, parameters = case.operation.label, case.path_parameters
        if case.meta is not None and case.meta.generation.mode is GenerationMode.POSITIVE and self.random.random() < 0.5:
            for name, known in self.ids.items():
                if name in parameters and known and parameters[name] not in known:
                    parameters[name] = self.random.choice(known[-NUM_RECENT:])
            if label == "POST /jobs":
                case.body = self._valid_spec(case.body)
            elif label == "POST /jobs/{job_id}/clone":
                case.body = {"name": "clone"}
            elif label in STREAMED and self.random.random() < 0.3:
                case.headers["Accept"] = "text/event-stream"
        if parameters.get("job_id") in self.ids["job_id"] and (label.endswith("/stream") or "Accept" in case.headers):
            parameters["job_id"] = self.finished_job
        if label == "DELETE /jobs/{job_id}" and parameters.get("job_id") == self.finished_job:
            parameters["job_id"] = "00000000-none"
        [self.scope] = self.random.choices(list(KEY_SHARES), list(KEY_SHARES.values()))

    def _valid_spec(self, made_up: Any) -> dict[str, Any]:
        """A spec that can be run, with those parts of the made-up one that fit."""
        spec = spec_dict()
        if self.ids["job_id"] and self.random.random() < 0.3:
            spec |= {"recipe": "clip_kd", "teacher": {"job": self.random.choice(self.ids["job_id"][-NUM_RECENT:])}}
        for part in ("name", "labels", "training", "resources"):
            if isinstance(made_up, dict) and part in made_up:
                try:
                    JobSpec.model_validate(spec | {part: made_up[part]})
                except ValidationError:
                    continue
                spec[part] = made_up[part]
        if self.random.random() < 0.3:
            tower = self.random.choice(list(CONFIG_KEYS))
            odd = {self.random.choice(CONFIG_KEYS[tower]): self.random.choice(ODD_VALUES)}
            spec["student"] = {"config": {**TINY_CONFIG, tower: {**TINY_CONFIG[tower], **odd}}}
        return spec

    def call_arguments(self) -> dict[str, Any]:
        headers = {} if self.scope is None else {"Authorization": f"Bearer {self.keys[self.scope]}"}
        return {"base_url": self.url, "headers": headers, "timeout": 30}

    def note(self, case: schemathesis.Case, response: Response) -> None:
        label = case.operation.label
        self.statuses[label][response.status_code] += 1
        if response.status_code == 201:
            self.ids["job_id"].append(response.json()["id"])
        if case.method == "DELETE" and response.status_code == 204 and case.path_parameters.get("job_id") in self.ids["job_id"]:
            self.ids["job_id"].remove(case.path_parameters["job_id"])  # so that no walk is led to what another one deleted
        if label == "GET /artifacts" and response.status_code == 200:
            self.ids["artifact_id"] += [one["id"] for one in response.json()["artifacts"]]

    def check(self, case: schemathesis.Case, response: Response, **arguments: Any) -> None:
        refusal = expected_refusal(case.path, case.method, self.scope)
        if refusal is not None and response.status_code != refusal:
            self._add_finding("NotRefused", f"a key of scope {self.scope} must get {refusal}", case, response)
        left_out = [] if refusal is None else ALLOWED_ONLY
        # Too long a request is refused before anyone looks at what is in it, which the check of refusals does not know.
        left_out = [*left_out, negative_data_rejection] if response.status_code == 431 else left_out
        try:
            case.validate_response(response, checks=[check for check in WANTED if check not in left_out], **arguments)
        except FailureGroup as group:
            for failure in group.exceptions:
                self._add_finding(type(failure).__name__, str(failure), case, response)

    def _add_finding(self, name: str, what: str, case: schemathesis.Case, response: Response) -> None:
        kind = f"{case.operation.label}: {name}"
        self.num_findings[kind] += 1
        request = case.as_curl_command(headers={"Authorization": "[hidden]"})
        text = f"{what}\n{request}\n{response.status_code}: {response.text[:1000]}"
        if self.findings.setdefault(kind, text) is text:
            print(f"\nfound: {kind}: {text}\n", flush=True)

    def table(self) -> str:
        """Requests by operation and status."""
        columns = sorted({status for counter in self.statuses.values() for status in counter})
        width = max(map(len, self.statuses), default=0)
        rows = [["operation".ljust(width), "requests", *map(str, columns)]]
        for label, counter in sorted(self.statuses.items()):
            rows.append([label.ljust(width), str(counter.total()), *(str(counter[status] or "") for status in columns)])
        total = sum(self.statuses.values(), Counter())
        rows.append(["all".ljust(width), str(total.total()), *(str(total[status]) for status in columns)])
        return "\n".join("  ".join(cell.rjust(6) for cell in row) for row in rows)


@pytest.fixture
def sessions(postgres_url: str) -> Iterator[sessionmaker[Session]]:
    """The database that the service and the workers share; here, PostgreSQL alone."""
    migrate(postgres_url)
    engine = make_engine(postgres_url)
    yield make_sessions(engine)
    engine.dispose()


@pytest.fixture
def service(sessions: sessionmaker[Session], postgres_url: str, redis_url: str, tmp_path: Path) -> Iterator[Service]:
    write_table(tmp_path)
    with sessions.begin() as session:
        keys = {scope: create_key(session=session, name="fuzz", scope=scope)[1] for scope in (KeyScope.ADMIN, KeyScope.READ)}
    claimed = claim(sessions, create(sessions).id)
    finish(sessions, claimed)
    environment = {
        "CLIPRD_DATABASE_URL": postgres_url,
        "CLIPRD_BROKER_URL": redis_url,
        "CLIPRD_DATA_ROOT": str(tmp_path),
        "CLIPRD_ARTIFACTS_ROOT": str(tmp_path / "artifacts"),
        "CLIPRD_TEACHER_STORE_ROOT": str(tmp_path / "stores"),
        "CLIPRD_PORT": "0",
    }
    with (tmp_path / "service.log").open("wb") as log:
        process = subprocess.Popen([sys.executable, "-m", "service"], env=os.environ | environment, stdout=log, stderr=log)
    workers = [SimulatedWorker(sessions, tmp_path / "artifacts", seed) for seed in range(2)]
    try:
        url = _wait_for_address(tmp_path / "service.log", process)
        for worker in workers:
            worker.start()
        yield Service(url, keys, tmp_path, claimed.job.id, workers)
    finally:
        for worker in workers:
            if worker.is_alive():
                worker.stop()
        process.terminate()
        process.wait(timeout=30)


def _wait_for_address(log: Path, process: subprocess.Popen[bytes]) -> str:
    """Where the service says that it listens."""
    deadline = time.monotonic() + START_SECONDS
    while (found := re.search(r"http://127\.0\.0\.1:\d+", log.read_text())) is None:
        assert process.poll() is None, f"the service ended with {process.returncode}"
        assert time.monotonic() < deadline, "the service did not start"
        time.sleep(0.1)
    return found[0]


@pytest.mark.timeout(0)
@pytest.mark.filterwarnings("default")
def test_walks_along_the_links(service: Service) -> None:
    schema = schemathesis.openapi.from_dict(create_app(Settings()).openapi())

    class Walk(schema.as_state_machine()):  # type: ignore[misc]  # made at run time
        def before_call(self, case: schemathesis.Case) -> None:
            service.prepare(case)

        def get_call_kwargs(self, _: schemathesis.Case) -> dict[str, Any]:
            return service.call_arguments()

        def after_call(self, response: Response, case: schemathesis.Case) -> None:
            super().after_call(response, case)
            service.note(case, response)

        def validate_response(self, response: Response, case: schemathesis.Case, *_: Any, **arguments: Any) -> None:
            service.check(case, response, transport_kwargs=arguments, recorder=self.recorder)

    alone = [strategy for one in schema.get_all_operations() for strategy in _strategies(one.ok())]
    started = time.monotonic()
    while service.num_cases < NUM_CASES:
        make_store(service.folder / "stores", seed=service.num_cases)
        Walk.run(settings=ROUND)
        for strategy in alone:  # also of what no link leads to
            _ask_alone(service, strategy)
        assert [worker.error for worker in service.workers] == [None, None]
        print(f"{service.num_cases} requests, {time.monotonic() - started:.0f} s, {service.num_findings.total()} findings", flush=True)
    print(f"\n{service.table()}")
    log = (service.folder / "service.log").read_text()
    assert not service.findings, "\n\n".join(f"{service.num_findings[kind]} x {kind}\n{text}" for kind, text in service.findings.items())
    assert "Traceback" not in log
    missing = {label: wanted - set(service.statuses[label]) for label, wanted in WALKED.items()}
    not_met = {label: statuses for label, statuses in missing.items() if statuses}
    print(f"not met: {not_met or 'nothing'}")
    assert not not_met or service.num_cases < NUM_CASES_TO_MEET_ALL, not_met


def _strategies(operation: Any) -> list[Any]:
    """What makes right requests of an operation, and wrong ones where it takes anything that can be wrong."""
    takes_anything = {"parameters", "requestBody"} & set(operation.definition.raw)
    modes = list(GenerationMode) if takes_anything else [GenerationMode.POSITIVE]
    return [operation.as_strategy(generation_mode=mode) for mode in modes]


def _ask_alone(service: Service, strategy: Any) -> None:
    """One request, or a few, without a story."""

    @settings(ROUND, max_examples=2)
    @given(case=strategy)
    def ask(case: schemathesis.Case) -> None:
        service.prepare(case)
        arguments = service.call_arguments()
        response = case.call(**arguments)
        service.note(case, response)
        service.check(case, response, transport_kwargs=arguments)

    with suppress(Unsatisfiable):  # of some operations no request can be wrong
        ask()
