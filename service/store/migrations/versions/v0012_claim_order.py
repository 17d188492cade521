"""An index in the order in which jobs are claimed: of a long queue the first one was found by sorting all."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0012"
down_revision = "0011"


def upgrade() -> None:
    op.create_index("jobs_to_claim_first", "jobs", ["state", "queue", sa.text("priority DESC"), "created_at", "id"])
    op.drop_index("jobs_to_claim", "jobs")
