"""The real trainer, but the process with `CLIPRD_TEST_HELD_STEP` in its environment does not begin that step before it is told to stop:
a run that a test is to kill or stop does not end first, however late the test is. What is computed stays the same. It ends with the process
that `CLIPRD_TEST_HELD_BY` names, the tests', if that ends before.

    python -m tests.held_trainer RUN/spec.json
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

from cliprd_core import train, trainer
from cliprd_core.data.batch import Batch
from cliprd_core.run_setup import Run
from cliprd_core.stopping import StopRequest

HELD_STEP_VARIABLE = "CLIPRD_TEST_HELD_STEP"
"""The number of a step, from 1. For a run that is to be stopped in good order not the last one, in which it would end well."""

HELD_BY_VARIABLE = "CLIPRD_TEST_HELD_BY"

train_step = trainer.train_step
stop = StopRequest()


def held_by_this(step: int) -> dict[str, str]:
    """Environment of a run that this process is to kill or stop before it begins the step."""
    return {HELD_STEP_VARIABLE: str(step), HELD_BY_VARIABLE: str(os.getpid())}


def held_step(run: Run, batch: Batch, step: int) -> trainer.StepOutput:
    while str(step + 1) == os.environ.get(HELD_STEP_VARIABLE) and not stop.requested:
        if not Path(f"/proc/{os.environ[HELD_BY_VARIABLE]}").exists():
            os._exit(1)
        time.sleep(0.02)
    return train_step(run, batch, step)


if __name__ == "__main__":
    trainer.train_step = held_step
    train.StopRequest = lambda: stop  # type: ignore[assignment, misc]
    sys.exit(train.main())
