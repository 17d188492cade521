"""Opaque cursors of keyset pages: newest first by (created_at, id), stable while rows are added."""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Generic, TypeVar

from sqlalchemy import Select, tuple_
from sqlalchemy.orm import InstrumentedAttribute, Session

from service.store.errors import InvalidCursorError

Row = TypeVar("Row")


@dataclass(frozen=True)
class Page(Generic[Row]):
    """One page of rows, and where the next one starts."""

    rows: Sequence[Row]
    next_cursor: str | None
    """Null: this was the last page."""


def newest_page(
    session: Session,
    query: Select[Row],
    created_at: InstrumentedAttribute[datetime],
    row_id: InstrumentedAttribute[str],
    *,
    limit: int,
    cursor: str | None,
) -> Page[Row]:
    """Run `query` from the cursor on, newest first.

    Raises:
        InvalidCursorError: the cursor was not made here.
    """
    if cursor is not None:
        query = query.where(tuple_(created_at, row_id) < _decode(cursor, created_at.class_.__name__))
    rows = session.scalars(query.order_by(created_at.desc(), row_id.desc()).limit(limit + 1)).all()
    if len(rows) <= limit:
        return Page(rows, None)
    last = rows[limit - 1]
    return Page(rows[:limit], _encode(created_at.class_.__name__, getattr(last, created_at.key), getattr(last, row_id.key)))


def _encode(kind: str, created_at: datetime, row_id: str) -> str:
    return base64.urlsafe_b64encode(json.dumps([kind, created_at.isoformat(), row_id]).encode()).decode().rstrip("=")


def _decode(cursor: str, kind: str) -> tuple[datetime, str]:
    try:
        of_kind, created_at, row_id = json.loads(base64.b64decode(cursor + "=" * (-len(cursor) % 4), altchars=b"-_", validate=True))
        time = datetime.fromisoformat(created_at)
        if time.tzinfo is None:
            raise InvalidCursorError
        time = time.astimezone(UTC)
    except (ValueError, TypeError, OverflowError, binascii.Error, RecursionError) as error:
        raise InvalidCursorError from error
    if of_kind != kind or not isinstance(row_id, str) or "\0" in row_id or not row_id.isascii():
        raise InvalidCursorError
    return time, row_id
