"""What jobs' training processes print, kept in chunks; the oldest go when a log becomes too long."""

from __future__ import annotations

from sqlalchemy import delete, func, select
from sqlalchemy.orm import Session

from service.store.leases import lock_held_job
from service.store.models import LogChunk

MAX_LOG_CHARACTERS = 8_000_000
"""Of one job: what lies further back than this is dropped, chunk by chunk."""


def append_log(*, session: Session, job_id: str, lease_token: str, text: str) -> None:
    """Add to the end of a job's log.

    Raises:
        LeaseLostError: the token no longer holds the job.
    """
    lock_held_job(session=session, job_id=job_id, lease_token=lease_token)
    add_text(session=session, job_id=job_id, text=text)


def add_line(*, session: Session, job_id: str, line: str) -> None:
    """Add a line to the log of a job that the caller has locked and nobody holds any more; what stands there last may be no whole line."""
    last = session.scalar(select(LogChunk.text).where(LogChunk.job_id == job_id).order_by(LogChunk.start.desc()).limit(1))
    lead = "" if last is None or last.endswith("\n") else "\n"
    add_text(session=session, job_id=job_id, text=f"{lead}{line}\n")


def add_text(*, session: Session, job_id: str, text: str) -> None:
    """Add to the end of the log of a job that the caller has locked."""
    start = end_of_log(session=session, job_id=job_id)
    end = start + len(text)
    session.add(LogChunk(job_id=job_id, start=start, end=end, text=text.replace("\0", "\ufffd")))  # PostgreSQL's text knows no NUL
    session.flush()
    session.execute(delete(LogChunk).where(LogChunk.job_id == job_id, LogChunk.end <= end - MAX_LOG_CHARACTERS))


def end_of_log(*, session: Session, job_id: str) -> int:
    """How many characters a job's log has had so far; what was dropped counts."""
    return session.scalar(select(func.max(LogChunk.end)).where(LogChunk.job_id == job_id)) or 0


def read_log(*, session: Session, job_id: str, after: int = 0, limit: int | None = None) -> tuple[str, int]:
    """The log from the character `after` on, and where it ends; nothing and the same place if there is no more.

    Args:
        session: for reading.
        job_id: the job.
        after: characters to skip; what was dropped counts.
        limit: chunks, at most; None: all.
    """
    query = select(LogChunk).where(LogChunk.job_id == job_id, LogChunk.end > after).order_by(LogChunk.start).limit(limit)
    chunks = session.scalars(query).all()
    if not chunks:
        return "", after
    return "".join(chunk.text for chunk in chunks)[max(0, after - chunks[0].start) :], chunks[-1].end


def tail_start(*, session: Session, job_id: str, num_lines: int) -> int:
    """The character at which the last lines of a job's log start."""
    query = select(LogChunk).where(LogChunk.job_id == job_id).order_by(LogChunk.start.desc())
    is_last = True
    with session.scalars(query.execution_options(yield_per=20)) as chunks:
        for chunk in chunks:
            text = chunk.text.removesuffix("\n") if is_last else chunk.text
            is_last = False
            breaks = text.count("\n")
            if breaks >= num_lines:
                return chunk.start + len(text) - len("\n".join(text.split("\n")[-num_lines:]))
            num_lines -= breaks
    return 0
