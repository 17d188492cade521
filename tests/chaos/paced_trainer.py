"""The real trainer at a pace: rank 0 waits `CLIPRD_CHAOS_STEP_SECONDS` after each step's record, so that a run of a few steps lasts long
enough for a fault to hit it, and costs little. Where `CLIPRD_CHAOS_HELD_STEP` is set, the first attempt waits after that step to be
killed, so that it does not finish before that, however late it comes. What is computed stays the same.

    python tests/chaos/paced_trainer.py RUN/spec.json
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

from cliprd_core import run_dir
from cliprd_core.run_dir import ATTEMPT_VARIABLE, MetricsRecord, Record

PACE_VARIABLE = "CLIPRD_CHAOS_STEP_SECONDS"
HELD_STEP_VARIABLE = "CLIPRD_CHAOS_HELD_STEP"

append_record = run_dir.append_record


def append_and_wait(path: Path, record: Record) -> None:
    append_record(path, record)
    if isinstance(record, MetricsRecord):
        time.sleep(float(os.environ[PACE_VARIABLE]))
        while str(record.step) == os.environ.get(HELD_STEP_VARIABLE) and os.environ[ATTEMPT_VARIABLE] == "1":
            time.sleep(1)


if __name__ == "__main__":
    run_dir.append_record = append_and_wait  # before the trainer imports it
    from cliprd_core.train import main

    sys.exit(main())
