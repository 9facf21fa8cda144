"""API keys; whose a file and a job is."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"

_ROW_NUMBER = sa.Integer().with_variant(sa.BigInteger(), "postgresql")


def upgrade() -> None:
    op.create_table(
        "api_keys",
        sa.Column("seq", _ROW_NUMBER, primary_key=True, autoincrement=True),
        sa.Column("id", sa.String(), nullable=False, unique=True),
        sa.Column("name", sa.String(), nullable=False),
        sa.Column("tenant", sa.String(), nullable=False),
        sa.Column("scopes", sa.JSON(), nullable=False),
        sa.Column("limits", sa.JSON(), nullable=False),
        sa.Column("created_at", sa.BigInteger(), nullable=False),
        sa.Column("expires_at", sa.BigInteger()),
        sa.Column("revoked_at", sa.BigInteger()),
        sa.Column("last_used_at", sa.BigInteger()),
        sa.Column("hash", sa.String(), nullable=False),
        sa.Column("previous_hash", sa.String()),
        sa.Column("previous_until", sa.BigInteger()),
    )
    op.add_column("files", sa.Column("owner", sa.String(), nullable=False, server_default=sa.text("''")))
    op.create_index("ix_files_owner", "files", ["owner"])
    op.add_column("jobs", sa.Column("tenant", sa.String(), nullable=False, server_default=sa.text("''")))
    op.create_index("ix_jobs_tenant", "jobs", ["tenant"])
