"""A job may wait for several teachers: a table in place of the column `jobs.teacher_job_id`."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    op.create_table(
        "job_teachers",
        sa.Column("job_id", sa.String(64), sa.ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True),
        sa.Column("teacher_job_id", sa.String(64), sa.ForeignKey("jobs.id"), primary_key=True),
    )
    op.create_index("job_teachers_by_teacher", "job_teachers", ["teacher_job_id"])
    op.execute("INSERT INTO job_teachers SELECT id, teacher_job_id FROM jobs WHERE teacher_job_id IS NOT NULL")
    with op.batch_alter_table("jobs") as jobs:
        jobs.drop_index("jobs_by_teacher")
        jobs.drop_column("teacher_job_id")
