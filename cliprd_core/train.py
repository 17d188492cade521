"""The training process: `python -m cliprd_core.train spec.json [--run-dir DIR]`, alone or under torchrun or any launcher like it.

Exit codes: 0 finished; 75 (EXIT_CODE_STOPPED) stopped by SIGTERM with a checkpoint saved; 1 failed, and error.json says why.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from pathlib import Path

from cliprd_core.failures import describe_failure, write_failure
from cliprd_core.launcher import adopt_launcher_environment
from cliprd_core.run_dir import ERROR_FILE, EXIT_CODE_STOPPED, RESULT_FILE
from cliprd_core.spec import JobSpec
from cliprd_core.stopping import StopRequest, die_with_parent_if_asked


def main(arguments: list[str] | None = None) -> int:
    """Run the job; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m cliprd_core.train", description="Train one job, or resume it.")
    parser.add_argument("spec", type=Path, help="job spec, a JSON file")
    parser.add_argument("--run-dir", type=Path, help="where records, checkpoints and the result go (default: the spec's folder)")
    given = parser.parse_args(arguments)
    if not given.spec.is_file():
        parser.error(f"there is no file {given.spec}")
    die_with_parent_if_asked()
    stop = StopRequest().listen()
    try:
        adopt_launcher_environment()
    except ValueError as error:
        parser.error(str(error))
    run_dir: Path = (given.run_dir or given.spec.parent).resolve()
    run_dir.mkdir(parents=True, exist_ok=True)
    is_main = os.environ.get("RANK", "0") == "0"
    logging.basicConfig(stream=sys.stdout, format="%(asctime)s %(levelname)s %(message)s", level=logging.WARNING)
    logging.getLogger("cliprd_core").setLevel(logging.INFO if is_main else logging.WARNING)
    if is_main:
        for stale in (RESULT_FILE, ERROR_FILE):
            (run_dir / stale).unlink(missing_ok=True)
    spec = None
    try:
        spec = JobSpec.model_validate_json(given.spec.read_bytes())
        from cliprd_core.trainer import Outcome, train  # here, since it loads torch: a bad spec fails at once

        outcome = train(spec, run_dir, stop)
    except Exception as error:
        record = describe_failure(error, spec)
        write_failure(run_dir, record)
        logging.getLogger("cliprd_core").exception("%s: %s", record.reason.value, record.message)
        return 1
    return EXIT_CODE_STOPPED if outcome is Outcome.STOPPED else 0


if __name__ == "__main__":
    sys.exit(main())
