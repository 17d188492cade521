"""Opaque cursors of keyset pages, stable while rows are added; of most lists newest first, by (created_at, id)."""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import accumulate
from typing import Any, Generic, TypeVar

from sqlalchemy import ColumnElement, Select, select, tuple_
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
    size: ColumnElement[int] | None = None,
    max_size: int = 0,
) -> Page[Row]:
    """Run `query` from the cursor on, newest first.

    Args:
        session: The database's.
        query: What to list.
        created_at: When a row was made.
        row_id: What orders rows of one moment.
        limit: Rows of the page, at most.
        cursor: An earlier page's `next_cursor`.
        size: How large a row is, where that varies much.
        max_size: Of all rows of a page together, but for a single row that is larger.

    Raises:
        InvalidCursorError: the cursor was not made here.
    """
    kind = created_at.class_.__name__
    if cursor is not None:
        time, last_id = decode(cursor, kind, str, str)
        query = query.where(tuple_(created_at, row_id) < (_moment(time), last_id))
    query = query.order_by(created_at.desc(), row_id.desc())
    if size is not None:
        found = query.with_only_columns(row_id).limit(limit).subquery()  # so that none but theirs are measured
        sizes = session.scalars(select(size).join(found, row_id == found.c[row_id.key]).order_by(created_at.desc(), row_id.desc())).all()
        limit = max(1, sum(total <= max_size for total in accumulate(sizes)))
    rows = session.scalars(query.limit(limit + 1)).all()
    if len(rows) <= limit:
        return Page(rows, None)
    last = rows[limit - 1]
    return Page(rows[:limit], encode(kind, getattr(last, created_at.key).isoformat(), getattr(last, row_id.key)))


def encode(kind: str, *position: str | int) -> str:
    """A cursor that goes on behind `position` in a list of this kind."""
    return base64.urlsafe_b64encode(json.dumps([kind, *position]).encode()).decode().rstrip("=")


def decode(cursor: str, kind: str, *types: type[str | int]) -> list[Any]:
    """The position that a cursor stands for, one value of each type.

    Raises:
        InvalidCursorError: it was not made here, or not for this kind of list.
    """
    try:
        parts: list[Any] = json.loads(base64.b64decode(cursor + "=" * (-len(cursor) % 4), altchars=b"-_", validate=True))
    except (ValueError, TypeError, binascii.Error, RecursionError) as error:
        raise InvalidCursorError from error
    if (
        not isinstance(parts, list)
        or [type(part) for part in parts] != [str, *types]
        or not all(map(_is_storable, parts))
        or parts[0] != kind
    ):
        raise InvalidCursorError
    return parts[1:]


def _is_storable(part: str | int) -> bool:
    """Whether a database can compare with it."""
    if isinstance(part, int):
        return 0 <= part < 2**63
    return "\0" not in part and part.encode("utf-8", "ignore").decode() == part


def _moment(time: str) -> datetime:
    try:
        moment = datetime.fromisoformat(time)
        if moment.tzinfo is None:
            raise InvalidCursorError
        return moment.astimezone(UTC)
    except (ValueError, OverflowError) as error:
        raise InvalidCursorError from error
