"""SIGTERM as a request, and no process outliving its launcher."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import psutil

from cliprd_core.stopping import DIE_WITH_PARENT_VARIABLE, StopRequest

CHILD = "from cliprd_core.stopping import *; die_with_parent_if_asked(); print(os.getpid(), flush=True); signal.pause()"
PARENT = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {CHILD!r}])"


def test_sigterm_is_remembered_however_often_it_comes() -> None:
    before = signal.getsignal(signal.SIGTERM)
    try:
        stop = StopRequest().listen()
        assert not stop.requested
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGTERM)
        assert stop.requested
    finally:
        signal.signal(signal.SIGTERM, before)


def test_child_dies_with_its_parent_if_asked() -> None:
    parent = subprocess.Popen([sys.executable, "-c", PARENT], env={**os.environ, DIE_WITH_PARENT_VARIABLE: "1"}, stdout=subprocess.PIPE)
    try:
        assert parent.stdout is not None
        child = psutil.Process(int(parent.stdout.readline()))
        assert child.is_running()
        parent.kill()
        child.wait(timeout=60)
    finally:
        parent.kill()
        parent.communicate()


def test_child_survives_its_parent_if_not_asked() -> None:
    environment = {name: value for name, value in os.environ.items() if name != DIE_WITH_PARENT_VARIABLE}
    parent = subprocess.Popen([sys.executable, "-c", PARENT], env=environment, stdout=subprocess.PIPE)
    assert parent.stdout is not None
    child = psutil.Process(int(parent.stdout.readline()))
    try:
        parent.kill()
        parent.wait()
        time.sleep(0.3)
        assert child.is_running()
    finally:
        child.kill()
        parent.communicate()
