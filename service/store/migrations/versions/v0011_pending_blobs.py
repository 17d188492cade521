"""Whose upload some bytes are, which are unneeded unless it becomes known."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0011"
down_revision = "0010"


def upgrade() -> None:
    op.add_column("unneeded_blobs", sa.Column("lease_token", sa.String(64)))
