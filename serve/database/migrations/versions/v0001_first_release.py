"""Files, jobs with their leases, labels and events.

Databases made by the first release have these tables, and nothing that says so: what is there already is kept.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None

_ROW_NUMBER = sa.Integer().with_variant(sa.BigInteger(), "postgresql")
_TABLES = sa.MetaData()

sa.Table(
    "files",
    _TABLES,
    sa.Column("seq", _ROW_NUMBER, primary_key=True, autoincrement=True),
    sa.Column("id", sa.String(), nullable=False, unique=True),
    sa.Column("filename", sa.String(), nullable=False),
    sa.Column("num_bytes", sa.BigInteger(), nullable=False),
    sa.Column("created_at", sa.BigInteger(), nullable=False),
    sa.Column("purpose", sa.String(), nullable=False),
)
sa.Table(
    "jobs",
    _TABLES,
    sa.Column("seq", _ROW_NUMBER, primary_key=True, autoincrement=True),
    sa.Column("id", sa.String(), nullable=False, unique=True),
    sa.Column("request", sa.JSON(), nullable=False),
    sa.Column("status", sa.String(), nullable=False, index=True),
    sa.Column("created_at", sa.BigInteger(), nullable=False),
    sa.Column("seed", sa.BigInteger(), nullable=False),
    sa.Column("started_at", sa.BigInteger()),
    sa.Column("finished_at", sa.BigInteger()),
    sa.Column("estimated_finish", sa.BigInteger()),
    sa.Column("fine_tuned_model", sa.String()),
    sa.Column("trained_tokens", sa.BigInteger()),
    sa.Column("error_code", sa.String()),
    sa.Column("error_message", sa.String()),
    sa.Column("error_param", sa.String()),
    sa.Column("result", sa.JSON(), nullable=False),
    sa.Column("fence", sa.BigInteger(), nullable=False),
    sa.Column("attempt", sa.Integer(), nullable=False),
    sa.Column("worker", sa.String()),
    sa.Column("lease_until_ms", sa.BigInteger(), nullable=False),
    sa.Column("not_before_ms", sa.BigInteger(), nullable=False),
    sa.Column("cancel_requested", sa.Boolean(), nullable=False),
    sa.Column("publication", sa.JSON()),
)
sa.Table(
    "job_labels",
    _TABLES,
    sa.Column("job_seq", _ROW_NUMBER, sa.ForeignKey("jobs.seq"), primary_key=True),
    sa.Column("key", sa.String(), primary_key=True),
    sa.Column("value", sa.String(), nullable=False),
)
sa.Table(
    "events",
    _TABLES,
    sa.Column("seq", _ROW_NUMBER, primary_key=True, autoincrement=True),
    sa.Column("id", sa.String(), nullable=False, unique=True),
    sa.Column("job_id", sa.String(), sa.ForeignKey("jobs.id"), nullable=False, index=True),
    sa.Column("created_at", sa.BigInteger(), nullable=False),
    sa.Column("level", sa.String(), nullable=False),
    sa.Column("message", sa.String(), nullable=False),
    sa.Column("type", sa.String(), nullable=False),
    sa.Column("data", sa.JSON(), nullable=False),
)


def upgrade() -> None:
    _TABLES.create_all(op.get_bind())
