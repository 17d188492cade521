"""The training run as processes: what torchrun is told, and that nothing of a run survives `kill`."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from service.die_with_parent import wrap
from tests.live import eventually
from worker import run_cookie
from worker.process import TrainingProcess, torchrun_command, trainer_environment
from worker.run_cookie import COOKIE_VARIABLE, new_cookie, processes_with_cookie
from worker.settings import WorkerSettings

TIMEOUT_SECONDS = 120.0

START_TREE = """
import subprocess, sys, time
child = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(60)"
for own_session in (False, True):
    process = subprocess.Popen([sys.executable, "-c", child], start_new_session=own_session, stdout=subprocess.PIPE)
    process.stdout.readline()
print("tree is up", flush=True)
time.sleep(60)
"""


def start(run: Path, code: str) -> TrainingProcess:
    return TrainingProcess(run, [sys.executable, "-c", code], dict(os.environ))


def wait_for_log(run: Path, text: str, times: int = 1) -> None:
    """Where several processes print it, their lines may run into each other."""
    deadline = time.monotonic() + TIMEOUT_SECONDS
    while (run / "log.txt").read_text().count(text) < times:
        assert time.monotonic() < deadline, (run / "log.txt").read_text()
        time.sleep(0.01)


def test_kill_leaves_nothing_even_in_other_sessions_and_after_the_parent(tmp_path: Path) -> None:
    process = start(tmp_path, START_TREE)
    wait_for_log(tmp_path, "tree is up")
    below = psutil.Process(process.pid).children(recursive=True)
    assert len(below) == 2
    assert len({os.getsid(child.pid) for child in below}) == 2, "the test should cover a session of its own"
    os.kill(process.pid, signal.SIGKILL)  # orphans the two
    assert process.wait(TIMEOUT_SECONDS)
    process.kill()
    assert not [child for child in below if child.is_running() and child.status() != psutil.STATUS_ZOMBIE]


def test_the_cookie_tells_runs_apart() -> None:
    cookie = new_cookie()
    others = f"{cookie}-not"
    marked, other = (subprocess.Popen(["sleep", "60"], env={**os.environ, COOKIE_VARIABLE: one}) for one in (cookie, others))
    try:
        for process, own in ((marked, cookie), (other, others)):  # a process that has just started has no environment yet
            assert eventually(lambda own=own: list(processes_with_cookie(own)) or None) == [process.pid]
        assert list(processes_with_cookie(cookie)) == [marked.pid]
    finally:
        for process in (marked, other):
            process.kill()
            process.wait()


def test_a_killed_process_counts_until_it_has_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """It may take long to let go of its files, and is without its environment by then."""
    script = """
import ctypes, threading, time
threading.Thread(target=time.sleep, args=(600,)).start()
ctypes.CDLL(None).pthread_exit(None)
"""
    with subprocess.Popen([sys.executable, "-c", script]) as ending:
        eventually(lambda: psutil.Process(ending.pid).status() == psutil.STATUS_ZOMBIE or None)  # with a thread that has not ended
        looks = iter([[ending.pid]])
        monkeypatch.setattr(run_cookie, "processes_with_cookie", lambda _: next(looks, []))
        monkeypatch.setattr(os, "kill", lambda *_: None)
        monkeypatch.setattr(run_cookie, "KILL_TIMEOUT_SECONDS", 600.0)
        num_looks = 0

        def look() -> bool:
            nonlocal num_looks
            num_looks += 1
            if num_looks == 3:
                monkeypatch.undo()
                ending.kill()
            return True

        assert run_cookie.kill_processes("its cookie", look) == []
        assert num_looks > 3
        assert psutil.Process(ending.pid).status() == psutil.STATUS_ZOMBIE


def test_terminate_is_polite(tmp_path: Path) -> None:
    code = "import signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: sys.exit(75)); print('ready', flush=True); time.sleep(60)"
    process = start(tmp_path, code)
    wait_for_log(tmp_path, "ready")
    process.terminate()
    assert process.wait(TIMEOUT_SECONDS)
    assert process.report().exit_code == 75


def test_a_run_dies_with_its_parent(tmp_path: Path) -> None:
    script = """
import os, subprocess, sys, time
from service.die_with_parent import wrap
print(subprocess.Popen(wrap(["sleep", "60"]), start_new_session=True).pid, flush=True)
time.sleep(60)
"""
    parent = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2])
    assert parent.stdout is not None
    child = psutil.Process(int(parent.stdout.readline()))
    eventually(lambda: child.name() == "sleep" or None)  # past prctl
    parent.kill()
    parent.wait()
    parent.stdout.close()
    _, alive = psutil.wait_procs([child], timeout=TIMEOUT_SECONDS)
    assert not [one for one in alive if one.status() != psutil.STATUS_ZOMBIE]


def test_nothing_starts_when_the_parent_is_gone_already() -> None:
    command = wrap(["touch", "never"])
    command[4] = "1"  # a parent that is not ours
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 1
    assert "parent died" in ended.stderr


@pytest.mark.parametrize(("code", "signal_number"), [("import os; os.kill(os.getpid(), 9)", 9), ("raise SystemExit(3)", None)])
def test_the_report_says_how_it_ended(tmp_path: Path, code: str, signal_number: int | None) -> None:
    process = start(tmp_path, f"print('last words', flush=True); {code}")
    assert process.wait(TIMEOUT_SECONDS)
    report = process.report()
    assert report.signal_number == signal_number
    assert report.exit_code == (3 if signal_number is None else -9)
    assert report.last_lines == "last words"


def test_the_report_reads_torchruns_lines_of_this_attempt_only(tmp_path: Path) -> None:
    line = "torchrun: training process 0 (pid 1) failed with exitcode: "
    (tmp_path / "log.txt").write_text(f"{line}-9\n")  # an earlier attempt's
    process = start(tmp_path, f"print('{line}-11'); raise SystemExit(1)")
    assert process.wait(TIMEOUT_SECONDS)
    assert process.report().signal_number == signal.SIGSEGV


def test_torchrun_is_told_not_to_restart_and_to_be_more_patient_than_we_are() -> None:
    command = torchrun_command(2, 25.0, ["-m", "cliprd_core.train", "spec.json"])
    assert "--nproc-per-node=2" in command
    assert "--max-restarts=0" in command
    (timeout,) = [int(part.split("=")[1]) for part in command if part.startswith("--shutdown-timeout=")]
    assert timeout > 25


def test_threads_are_shared_out_unless_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    cores = len(os.sched_getaffinity(0))
    assert trainer_environment(1, 1)["OMP_NUM_THREADS"] == str(cores)
    assert trainer_environment(3, 10 * cores)["OMP_NUM_THREADS"] == "1"
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert trainer_environment(1, 1)["OMP_NUM_THREADS"] == "7"


def test_the_trainer_is_told_its_attempt_and_where_things_are(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert trainer_environment(3, 1)["CLIPRD_ATTEMPT"] == "3"
    environment = WorkerSettings(teacher_store_root=Path("stores"), cache_dir=Path("cache"), shard_cache_bytes=7).trainer_environment
    assert environment["CLIPRD_TEACHER_STORE_ROOT"] == str(tmp_path / "stores"), "absolute, whatever the trainer's folder is"
    assert environment["CLIPRD_CACHE_DIR"] == str(tmp_path / "cache")
    assert environment["CLIPRD_SHARD_CACHE_BYTES"] == "7"


def test_the_trainer_is_told_where_the_jobs_share_what_they_know_of_data(tmp_path: Path) -> None:
    settings = WorkerSettings(cache_dir=tmp_path / "cache", shard_cache_bytes=123)
    program = "import os; print(os.environ['CLIPRD_CACHE_DIR'], os.environ['CLIPRD_SHARD_CACHE_BYTES'])"
    (tmp_path / "program.py").write_text(program)
    process = TrainingProcess.start(
        tmp_path,
        attempt=1,
        num_processes=1,
        grace_seconds=1.0,
        trainer=[str(tmp_path / "program.py")],
        environment=settings.trainer_environment,
    )
    assert process.wait(TIMEOUT_SECONDS)
    assert f"{tmp_path / 'cache'} 123" in process.report().last_lines


def under_torchrun(run: Path, code: str) -> TrainingProcess:
    """Two processes of a program, started as the trainer's are."""
    (run / "program.py").write_text(code)
    program = [str(run / "program.py")]
    return TrainingProcess.start(run, attempt=1, num_processes=2, grace_seconds=5.0, trainer=program, environment={})


FIRST_FAILS = """
import os, signal, time
if os.environ["RANK"] == "0":
    {ends}
time.sleep(60)
"""


@pytest.mark.parametrize(("ends", "signal_number"), [("raise SystemExit(3)", signal.SIGTERM), ("os.kill(os.getpid(), 9)", signal.SIGKILL)])
def test_torchrun_says_who_failed_in_a_line_each(tmp_path: Path, ends: str, signal_number: int) -> None:
    process = under_torchrun(tmp_path, FIRST_FAILS.format(ends=ends))
    assert process.wait(TIMEOUT_SECONDS)
    report = process.report()
    first, second = report.last_lines.splitlines()[-2:]
    assert first.startswith("torchrun: training process 0 (pid ")
    assert second.startswith("torchrun: training process 1 (pid ")
    assert "Traceback" not in report.last_lines
    assert (report.exit_code, report.signal_number) == (1, signal_number)


def test_a_run_under_torchrun_that_is_asked_to_stop_says_that_it_did(tmp_path: Path) -> None:
    code = "import signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: sys.exit(75)); print('ready', flush=True); time.sleep(60)"
    process = under_torchrun(tmp_path, code)
    wait_for_log(tmp_path, "ready", times=2)
    process.terminate()
    assert process.wait(TIMEOUT_SECONDS)
    report = process.report()
    assert report.was_stopped
    assert "Traceback" not in report.last_lines
