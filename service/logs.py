"""Logs as one JSON object a line, for CLIPRD_LOG_FORMAT=json, with the job and attempt that each is about."""

from __future__ import annotations

import json
import logging
import sys
from contextvars import ContextVar
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any

_request: ContextVar[dict[str, Any]] = ContextVar("cliprd_log_request")
_process: dict[str, Any] = {}
"""What all threads of this process work on: a worker's process has one job at a time, and a context variable stops at its thread."""

_FIELDS = ("job_id", "attempt")
"""What a single record may be about (`about`)."""

_TAKEN_OVER = ("uvicorn", "uvicorn.error", "uvicorn.access", "celery", "celery.redirected")


class LogFormat(StrEnum):
    """How logs are written."""

    TEXT = "text"
    """For people."""
    JSON = "json"
    """One object a line: `time`, `level`, `logger`, `message`, and where it applies `job_id`, `attempt`, `request`, `error`."""


def set_request(**fields: Any) -> None:
    """What the current request's log lines are about."""
    _request.set(fields)


def set_job(job_id: str, attempt: int) -> None:
    """What this process's log lines are about from now on; to be undone by `clear_job`."""
    _process.update(job_id=job_id, attempt=attempt)


def clear_job() -> None:
    """This process works on no job."""
    _process.clear()


def about(job_id: str, attempt: int | None = None) -> dict[str, Any]:
    """`extra` of a log call about a job, and maybe about one attempt, that this process does not work on."""
    return {"job_id": job_id} if attempt is None else {"job_id": job_id, "attempt": attempt}


def handed_down() -> str:
    """How this process logs, and about which job, for `take_over` in a process that it starts."""
    is_json = any(isinstance(handler.formatter, JsonFormatter) for handler in logging.root.handlers)
    return json.dumps({"format": LogFormat.JSON if is_json else LogFormat.TEXT, "about": _process})


def take_over(handed: str) -> None:
    """Log as the process that started this one does."""
    record = json.loads(handed)
    configure(LogFormat(record["format"]))
    _process.update(record["about"])


class JsonFormatter(logging.Formatter):
    """One JSON object a record."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **_process,
            **_request.get({}),
            **{name: record.__dict__[name] for name in _FIELDS if name in record.__dict__},
        }
        if record.exc_info and record.exc_info[0] is not None:
            line["error"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def configure(log_format: LogFormat, level: int = logging.INFO) -> None:
    """Write all logs of this process to standard error as JSON. For `text` nothing is changed: uvicorn and Celery have their own."""
    if log_format is not LogFormat.JSON:
        return
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter())
    logging.root.handlers = [handler]
    logging.root.setLevel(level)
    for name in _TAKEN_OVER:
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [], True
