"""The whole service as real processes: API, two workers, Redis, and PostgreSQL, both behind proxies. Everything dies with this process."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import uuid
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Self

import httpx
import psutil
from sqlalchemy.engine import make_url

from service.embedded import API_GRACE_SECONDS, Child, answers, held_port, wait_until, worker_command
from tests.chaos.paced_trainer import PACE_VARIABLE
from tests.chaos.proxy import Proxy
from tests.chaos.trainers import MARK_VARIABLE, Census, Marked
from tests.live import SHORT_LEASES, eventually
from tests.postgres_server import PostgresServer
from tests.redis_server import RedisServer

STOP_SECONDS = 20.0
STEP_SECONDS = 0.05
TRAINER = Path(__file__).with_name("paced_trainer.py")
CUT_PROBABILITY = 0.04


class Worker:
    """A Celery worker: its parent process, and the pool's child that runs jobs.

    Args:
        name: Also of its connections, to PostgreSQL.
        child: Its parent process.
    """

    def __init__(self, name: str, child: Child) -> None:
        self.name = name
        self.child = child

    @property
    def environment(self) -> dict[str, str]:
        return self.child.environment

    @property
    def runs(self) -> Path:
        return Path(self.environment["CLIPRD_RUNS_ROOT"])

    @property
    def process(self) -> subprocess.Popen[bytes]:
        assert self.child.process is not None, "it was not started"
        return self.child.process

    def wait_until_ready(self) -> None:
        """Wait until it takes jobs for the first time."""
        wait_until(lambda: b" ready." in self.child.log_path.read_bytes(), self.child)

    def pool_child(self) -> psutil.Process:
        """The process that runs jobs."""
        return eventually(lambda: next(iter(psutil.Process(self.process.pid).children()), None))

    def holds(self, pid: int) -> bool:
        """Whether a process is this worker's, or started by it."""
        with_parents = [pid, *(parent.pid for parent in psutil.Process(pid).parents())] if psutil.pid_exists(pid) else []
        return self.process.pid in with_parents

    def signal(self, number: signal.Signals) -> None:
        """To parent and child."""
        for process in (psutil.Process(self.process.pid), self.pool_child()):
            process.send_signal(number)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


class Stack:
    """Context manager. The workers share one folder of run directories, as on one machine, unless `are_apart`.

    Args:
        home: A folder for everything that the service keeps.
        postgres: Runs already; a database of the stack's own is made there.
        shards_root: Where data may be read.
        settings: `CLIPRD_…`, beside those of SHORT_LEASES.
        are_apart: Each worker has run directories of its own, as on two machines.
        rng: Decides where connections break.
    """

    def __init__(
        self,
        home: Path,
        postgres: PostgresServer,
        shards_root: Path,
        *,
        settings: Mapping[str, str],
        are_apart: bool,
        rng: random.Random,
    ) -> None:
        self.home = home
        self.postgres = postgres
        self.mark = uuid.uuid4().hex
        self._shards_root = shards_root
        self._settings = settings
        self._are_apart = are_apart
        self._cleanup = ExitStack()
        self.proxy = Proxy(postgres.socket, cut_probability=CUT_PROBABILITY, rng=rng)
        self.redis = RedisServer()
        self.broker_proxy = Proxy(self.redis.port, cut_probability=CUT_PROBABILITY, rng=rng)
        self.port = 0
        self.url = ""
        self.workers: list[Worker] = []

    def __enter__(self) -> Self:
        with ExitStack() as cleanup:
            self._start(cleanup)
            self._cleanup = cleanup.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._cleanup.close()

    def _start(self, cleanup: ExitStack) -> None:
        self.port = cleanup.enter_context(held_port(0))
        self.url = f"http://127.0.0.1:{self.port}"
        self.database_url = cleanup.enter_context(self.postgres.database())
        cleanup.enter_context(self.proxy)
        cleanup.enter_context(self.redis)
        cleanup.enter_context(self.broker_proxy)
        self.api = self._child("api", [sys.executable, "-m", "service"], API_GRACE_SECONDS + 2.0, self.environment())
        for number in (1, 2):
            runs = f"runs-{number}" if self._are_apart else "runs"
            name = f"worker-{number}"
            command = [*worker_command(), "-n", f"{name}@chaos"]
            environment = self.environment(runs) | {"PGAPPNAME": name}
            self.workers.append(Worker(name, self._child(name, command, STOP_SECONDS, environment)))
        for child in (self.api, *(worker.child for worker in self.workers)):
            cleanup.callback(child.stop)
        self.start_api()
        for worker in self.workers:
            worker.child.start()

    def _child(self, name: str, command: list[str], stop_seconds: float, environment: dict[str, str]) -> Child:
        return Child(name, command, environment, self.home / f"{name}.log", stop_seconds)

    def environment(self, runs: str = "runs") -> dict[str, str]:
        """What API and workers run with. One thread, so that all runs are of the same bits."""
        database = make_url(self.database_url).set(host="127.0.0.1", port=self.proxy.port, query={})
        return {
            **os.environ,
            **{MARK_VARIABLE: self.mark, "OMP_NUM_THREADS": "1", PACE_VARIABLE: str(STEP_SECONDS)},
            "CLIPRD_DATABASE_URL": database.render_as_string(hide_password=False),
            "CLIPRD_BROKER_URL": f"redis://127.0.0.1:{self.broker_proxy.port}/0",
            "CLIPRD_PORT": str(self.port),
            "CLIPRD_ARTIFACTS_ROOT": str(self.home / "artifacts"),
            "CLIPRD_RUNS_ROOT": str(self.home / runs),
            "CLIPRD_TEACHER_STORE_ROOT": str(self.home / "teacher-stores"),
            "CLIPRD_CACHE_DIR": str(self.home / "cache"),
            "CLIPRD_DATA_ROOTS": str(self._shards_root),
            "CLIPRD_TRAINER": str(TRAINER),
            "CLIPRD_GRACE_SECONDS": "10",
            "CLIPRD_RESEND_SECONDS": "2",
            "CLIPRD_STREAM_POLL_SECONDS": "0.2",
            **SHORT_LEASES,
            **self._settings,
        }

    def start_api(self) -> None:
        """Start the API, and wait until it answers."""
        self.api.start()
        wait_until(lambda: answers(self.url), self.api)

    def is_ready(self) -> bool:
        """Whether the API reaches database, broker and artifact store."""
        try:
            return httpx.get(f"{self.url}/readyz", timeout=30.0, trust_env=False).is_success
        except httpx.TransportError:
            return False

    def census(self) -> list[Marked]:
        """All live processes of this stack, the servers' apart."""
        return Census(self.mark).take()

    def strays(self) -> list[Marked]:
        """Those that belong to no live worker and are not the API."""
        processes = {process.pid: process for process in self.census()}
        roots = [child.process for child in (self.api, *(worker.child for worker in self.workers))]
        known = {process.pid for process in roots if process is not None and process.poll() is None}

        def is_known(pid: int) -> bool:
            while pid in processes and pid not in known:
                pid = processes[pid].parent
            return pid in known

        return [process for process in processes.values() if not is_known(process.pid)]
