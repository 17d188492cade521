"""Many rows in one statement."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from sqlalchemy import TextClause, insert, inspect, text
from sqlalchemy.orm import Session

from service.store.models import Base


def insert_rows(session: Session, table: type[Base], rows: Sequence[Mapping[str, Any]]) -> None:
    """Insert rows in their order, all with the same columns; what a table's ORM defaults would add must be among them.

    To PostgreSQL they go as one JSON array: a statement for each row, though sent ahead, takes both sides three times as long. So text with
    a NUL character, which no column takes anyway, is refused there as a `DataError`.
    """
    if not rows:
        return
    session.flush()  # what they refer to
    if len(rows) == 1 or session.get_bind().dialect.name != "postgresql":
        session.connection().execute(insert(table), [*rows])
        return
    session.connection().execute(_insert_of(table, [*rows[0]]), {"rows": json.dumps(rows, default=_as_json)})


def _insert_of(table: type[Base], columns: Sequence[str]) -> TextClause:
    name = inspect(table).local_table.description
    given = ", ".join(columns)
    return text(f"INSERT INTO {name} ({given}) SELECT {given} FROM json_populate_recordset(NULL::{name}, CAST(:rows AS json))")  # noqa: S608


def _as_json(value: object) -> str:
    """
    Raises:
        TypeError: it is of a kind that our columns don't have.
    """
    if isinstance(value, datetime):
        assert value.tzinfo is not None, "naive datetime"
        return value.isoformat()
    raise TypeError(f"{type(value).__name__} is in no row")
