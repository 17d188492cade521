"""torchrun, but with one line for each training process that failed in place of a traceback of its own and a table: what the processes
themselves said shall be the last long thing in a run's log.

    python -m cliprd_core.torchrun ARGUMENTS_OF_TORCHRUN
"""

from __future__ import annotations

import sys

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main as torchrun


def main(arguments: list[str] | None = None) -> int:
    """Run torchrun; returns the exit code. The lines are read by `worker.process`."""
    try:
        torchrun(arguments)
    except ChildFailedError as error:
        for rank, failure in sorted(error.failures.items(), key=lambda one: one[1].timestamp):  # the root cause first
            print(f"torchrun: training process {rank} (pid {failure.pid}) failed with exitcode: {failure.exitcode}", file=sys.stderr)
        return 1
    except SignalException as error:
        print(f"torchrun: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
