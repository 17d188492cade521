"""What a run tells the store: its records, its log, and what its supervisor adds to the log."""

from __future__ import annotations

import os
import time
from functools import partial
from pathlib import Path

from cliprd_core.run_dir import EVALUATIONS_FILE, LOG_FILE, METRICS_FILE, EvaluationRecord, MetricsRecord
from service.store.jobs import LeaseLostError
from worker.held_job import OUT_OF_REACH, HeldJob
from worker.pump import LogPump, RecordPump


class Reports:
    """The pumps of one attempt's files.

    Args:
        job: Whose run it is.
        run: Its run directory, which need not exist yet.
    """

    def __init__(self, job: HeldJob, run: Path) -> None:
        self._job = job
        self._log = run / LOG_FILE
        self._pumps: list[RecordPump[MetricsRecord] | RecordPump[EvaluationRecord]] = [
            RecordPump(run / METRICS_FILE, MetricsRecord, job.record_metrics, OUT_OF_REACH),
            RecordPump(run / EVALUATIONS_FILE, EvaluationRecord, job.record_evaluations, OUT_OF_REACH),
        ]
        self._log_pump = LogPump(self._log, job.append_log, OUT_OF_REACH)
        self._unwritten = ""
        """Of what was said, what the run directory did not take."""

    def pump(self) -> None:
        """Write some of what is new; what can't be written now is written later."""
        for pump in self._pumps:
            pump.pump()
        self._log_pump.pump()

    def say(self, text: str) -> None:
        """Add whole lines to the job's log. Where the run directory can't take them, as on a full disk, the store alone does."""
        try:
            with self._log.open("ab+") as log:
                if log.seek(0, os.SEEK_END):
                    log.seek(-1, os.SEEK_END)
                    text = text if log.read(1) == b"\n" else f"\n{text}"
                log.write(text.encode())
        except OSError:
            self._unwritten += text

    def drain(self) -> None:
        """Write the last records and lines, however long the store is away.

        Raises:
            LeaseLostError: the job is another worker's now.
        """
        while not all(pump.is_drained() for pump in self._pumps):
            if self._job.is_lost():
                raise LeaseLostError(self._job.id)
            for pump in self._pumps:
                pump.pump()
            time.sleep(0.02)
        self.drain_log()

    def drain_log(self) -> None:
        """Write the last lines of the log; as `drain`."""
        while not self._log_pump.drain():
            if self._job.is_lost():
                raise LeaseLostError(self._job.id)
            time.sleep(0.02)
        if self._unwritten:
            self._job.patiently(partial(self._job.append_log, self._unwritten))
            self._unwritten = ""
