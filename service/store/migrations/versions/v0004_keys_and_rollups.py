"""API keys, a count of lost attempts, and rollups of metrics, which are made here of the metrics there are."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"

WIDTHS = tuple(4**power for power in range(2, 11))

ROLL_UP = """
INSERT INTO metric_rollups (job_id, name, width, bucket, low_step, low_value, high_step, high_value)
SELECT job_id, name, {width}, bucket,
       max(CASE WHEN low = 1 THEN step END), max(CASE WHEN low = 1 THEN value END),
       max(CASE WHEN high = 1 THEN step END), max(CASE WHEN high = 1 THEN value END)
FROM (
  SELECT job_id, name, bucket, step, value,
         row_number() OVER (PARTITION BY job_id, name, bucket ORDER BY value, step) AS low,
         row_number() OVER (PARTITION BY job_id, name, bucket ORDER BY value DESC, step) AS high
  FROM (SELECT job_id, name, step / {width} AS bucket, step, value FROM ({points}) AS points) AS numbered
) AS ranked
GROUP BY job_id, name, bucket
"""
VALUES = "SELECT job_id, name, step, value FROM metrics"
EXTREMES = """
SELECT job_id, name, low_step AS step, low_value AS value FROM metric_rollups WHERE width = {below}
UNION ALL SELECT job_id, name, high_step, high_value FROM metric_rollups WHERE width = {below}
"""


def upgrade() -> None:
    op.add_column("jobs", sa.Column("num_lost", sa.Integer, nullable=False, server_default="0"))
    op.create_table(
        "api_keys",
        sa.Column("id", sa.String(64), primary_key=True),
        sa.Column("name", sa.String(128), nullable=False),
        sa.Column("scope", sa.String(16), nullable=False),
        sa.Column("key_hash", sa.String(64), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("last_used_at", sa.DateTime(timezone=True)),
        sa.Column("revoked_at", sa.DateTime(timezone=True)),
        sa.UniqueConstraint("key_hash"),
    )
    op.create_table(
        "metric_rollups",
        sa.Column("job_id", sa.String(64), sa.ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True),
        sa.Column("name", sa.String(255), primary_key=True),
        sa.Column("width", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("bucket", sa.BigInteger, primary_key=True, autoincrement=False),
        sa.Column("low_step", sa.BigInteger, nullable=False),
        sa.Column("low_value", sa.Double, nullable=False),
        sa.Column("high_step", sa.BigInteger, nullable=False),
        sa.Column("high_value", sa.Double, nullable=False),
    )
    for level, width in enumerate(WIDTHS):
        points = VALUES if level == 0 else EXTREMES.format(below=WIDTHS[level - 1])
        op.execute(ROLL_UP.format(width=width, points=points))
