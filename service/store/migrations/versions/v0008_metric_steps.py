"""The order in which a job's steps were measured, so that a stream of metrics can tell what came late."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"


def upgrade() -> None:
    op.create_table(
        "metric_steps",
        sa.Column("job_id", sa.String(64), sa.ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True),
        sa.Column("step", sa.BigInteger, primary_key=True, autoincrement=False),
        sa.Column("position", sa.BigInteger, nullable=False),
    )
    op.execute("INSERT INTO metric_steps (job_id, step, position) SELECT DISTINCT job_id, step, step + 1 FROM metrics")
    op.create_index("metric_steps_in_order", "metric_steps", ["job_id", "position"], unique=True)
