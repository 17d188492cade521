"""An idempotency key outlives its job, so that a late repeat of the submission makes no second one."""

from __future__ import annotations

from alembic import op

revision = "0009"
down_revision = "0008"

LIKE_POSTGRESQL = {"fk": "%(table_name)s_%(column_0_name)s_fkey"}
"""How PostgreSQL has named the constraint; SQLite gave it no name."""


def upgrade() -> None:
    op.drop_index("idempotency_keys_by_job", "idempotency_keys")  # for the cascade alone
    with op.batch_alter_table("idempotency_keys", naming_convention=LIKE_POSTGRESQL) as keys:
        keys.drop_constraint("idempotency_keys_job_id_fkey", type_="foreignkey")
