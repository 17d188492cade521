"""Training runs whose student goes through torch.compile."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest

from cliprd_core.compiled_towers import CACHE_NAME
from cliprd_core.run_dir import ERROR_FILE, ErrorReason, ErrorRecord, read_record
from tests.training_runs import NUM_STEPS, Inputs, assert_same_weights, losses, make_inputs, run_here, start, wait_for_step

HAS_COMPILER = shutil.which("g++") is not None and any(Path(sys.base_prefix, "include").glob("python*/Python.h"))

COMPILE_SECONDS = 600
"""A minute where nothing else runs, without any kernel in the cache."""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    return make_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLIPRD_CACHE_DIR", str(tmp_path / "cache"))


@pytest.mark.timeout(4 * COMPILE_SECONDS)
@pytest.mark.skipif(not HAS_COMPILER, reason="torch.compile needs g++ and Python's headers")
@pytest.mark.usefixtures("_own_cache")
def test_compiled_and_killed_a_run_ends_with_the_weights_of_one_that_was_not(tmp_path: Path, inputs: Inputs) -> None:
    """With evaluations in between, which are of other batch sizes, and captions of other lengths in every batch."""
    changes = {"training": {"compile": True}, "data": {"validation": [inputs.source]}}
    straight, killed, plain = (tmp_path / name for name in ("straight", "killed", "plain"))
    process = start(straight, inputs.spec(**changes))
    assert process.wait(COMPILE_SECONDS) == 0, (straight / "log.txt").read_text()
    assert "compiled the student's towers" in (straight / "log.txt").read_text()
    assert any((tmp_path / "cache" / CACHE_NAME).iterdir())

    process = start(killed, inputs.spec(**changes), held_step=NUM_STEPS)
    wait_for_step(killed, 5, process, timeout_seconds=COMPILE_SECONDS)
    process.kill()
    process.wait()
    process = start(killed, inputs.spec(**changes), attempt=2)
    assert process.wait(COMPILE_SECONDS) == 0, (killed / "log.txt").read_text()
    assert_same_weights(straight, killed)

    assert run_here(plain, inputs.spec(data={"validation": [inputs.source]})) == 0
    assert losses(straight) == pytest.approx(losses(plain), rel=1e-4)


@pytest.mark.timeout(2 * COMPILE_SECONDS)
@pytest.mark.usefixtures("_own_cache")
def test_without_a_compiler_the_message_names_the_field_and_what_to_install(
    tmp_path: Path, inputs: Inputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "/nonexistent/g++")
    run = tmp_path / "run"
    assert start(run, inputs.spec(training={"compile": True})).wait(COMPILE_SECONDS) == 1
    error = read_record(run / ERROR_FILE, ErrorRecord)
    assert error is not None
    assert error.reason is ErrorReason.INVALID_SPEC
    assert "`training.compile`" in error.message
    assert "g++" in error.message
