"""The first tables: jobs, their labels, metrics, evaluations and artifacts."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None


def _time(name: str, *, nullable: bool = True) -> sa.Column[object]:
    return sa.Column(name, sa.DateTime(timezone=True), nullable=nullable)


def _job_id(*, primary_key: bool = False) -> sa.Column[object]:
    return sa.Column("job_id", sa.String(64), sa.ForeignKey("jobs.id", ondelete="CASCADE"), nullable=False, primary_key=primary_key)


def upgrade() -> None:
    _create_jobs()
    op.create_table(
        "job_labels",
        _job_id(primary_key=True),
        sa.Column("key", sa.String(64), primary_key=True),
        sa.Column("value", sa.String(128), nullable=False),
    )
    op.create_index("job_labels_by_value", "job_labels", ["key", "value", "job_id"])
    op.create_table(
        "metrics",
        _job_id(primary_key=True),
        sa.Column("name", sa.String(255), primary_key=True),
        sa.Column("step", sa.BigInteger, primary_key=True, autoincrement=False),
        sa.Column("attempt", sa.Integer, nullable=False),
        sa.Column("value", sa.Double, nullable=False),
    )
    op.create_table(
        "evaluations",
        _job_id(primary_key=True),
        sa.Column("step", sa.BigInteger, primary_key=True, autoincrement=False),
        sa.Column("task", sa.String(32), primary_key=True),
        sa.Column("dataset", sa.String(255), primary_key=True),
        sa.Column("attempt", sa.Integer, nullable=False),
        sa.Column("record", sa.JSON, nullable=False),
    )
    _create_artifacts()


def _create_jobs() -> None:
    op.create_table(
        "jobs",
        sa.Column("id", sa.String(64), primary_key=True),
        sa.Column("name", sa.String(128), nullable=False),
        sa.Column("recipe", sa.String(64), nullable=False),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("spec", sa.JSON, nullable=False),
        sa.Column("queue", sa.String(64), nullable=False),
        sa.Column("teacher_job_id", sa.String(64), sa.ForeignKey("jobs.id")),
        sa.Column("attempt", sa.Integer, nullable=False),
        sa.Column("num_releases", sa.Integer, nullable=False),
        sa.Column("max_attempts", sa.Integer, nullable=False),
        sa.Column("worker", sa.String(255)),
        sa.Column("lease_token", sa.String(64)),
        _time("lease_expires_at"),
        _time("cancel_requested_at"),
        _time("created_at", nullable=False),
        _time("queued_at"),
        _time("sent_at"),
        _time("started_at"),
        _time("finished_at"),
        sa.Column("progress", sa.JSON),
        sa.Column("metrics", sa.JSON),
        sa.Column("error", sa.JSON),
        sa.Column("result", sa.JSON),
    )
    op.create_index("jobs_newest", "jobs", ["created_at", "id"])
    op.create_index("jobs_newest_by_state", "jobs", ["state", "created_at", "id"])
    op.create_index("jobs_by_lease", "jobs", ["state", "lease_expires_at"])
    op.create_index("jobs_by_teacher", "jobs", ["teacher_job_id"])


def _create_artifacts() -> None:
    op.create_table(
        "artifacts",
        sa.Column("id", sa.String(64), primary_key=True),
        _job_id(),
        sa.Column("kind", sa.String(16), nullable=False),
        sa.Column("group_name", sa.String(128), nullable=False),
        sa.Column("step", sa.BigInteger),
        sa.Column("name", sa.String(255), nullable=False),
        sa.Column("num_bytes", sa.BigInteger, nullable=False),
        sa.Column("sha256", sa.String(64), nullable=False),
        sa.Column("media_type", sa.Text, nullable=False),
        sa.Column("storage_key", sa.String(255), nullable=False),
        _time("created_at", nullable=False),
        sa.UniqueConstraint("job_id", "kind", "group_name", "name", name="artifacts_one_per_name"),
    )
    op.create_index("artifacts_newest", "artifacts", ["created_at", "id"])
    op.create_index("artifacts_newest_by_job", "artifacts", ["job_id", "created_at", "id"])


def downgrade() -> None:
    for table in ("artifacts", "evaluations", "metrics", "job_labels", "jobs"):
        op.drop_table(table)
