"""When to try again to delete bytes; counters of how attempts ended."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0010"
down_revision = "0009"


def upgrade() -> None:
    op.add_column("unneeded_blobs", sa.Column("num_tries", sa.Integer(), nullable=False, server_default="0"))
    op.add_column(
        "unneeded_blobs",
        sa.Column("next_try_at", sa.DateTime(timezone=True), nullable=False, server_default="2026-01-01 00:00:00"),
    )
    op.create_index("unneeded_blobs_by_time", "unneeded_blobs", ["next_try_at"])
    op.create_table(
        "ended_attempts",
        sa.Column("queue", sa.String(64), primary_key=True),
        sa.Column("outcome", sa.String(32), primary_key=True),
        sa.Column("num_attempts", sa.BigInteger(), nullable=False),
    )
