"""Storage keys whose bytes are to be deleted, so that a deletion that fails is tried again."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"


def upgrade() -> None:
    op.create_table("unneeded_blobs", sa.Column("storage_key", sa.String(255), primary_key=True))
