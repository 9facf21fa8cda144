"""Turns, pausing and progress of jobs; idempotency keys; checkpoints; runs, artifacts and their deliveries."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"

_ROW_NUMBER = sa.Integer().with_variant(sa.BigInteger(), "postgresql")


def upgrade() -> None:
    _extend_jobs()
    _create_job_tables()
    _create_lineage_tables()


def _extend_jobs() -> None:
    for column in (
        sa.Column("owner", sa.String(), nullable=False, server_default=sa.text("''")),
        sa.Column("priority", sa.Integer(), nullable=False, server_default="0"),
        sa.Column("turn", sa.BigInteger(), nullable=False, server_default="0"),
        sa.Column("progress", sa.BigInteger(), nullable=False, server_default="0"),
        sa.Column("pause_requested", sa.Boolean(), nullable=False, server_default="0"),
    ):
        op.add_column("jobs", column)
    op.create_index("ix_jobs_owner", "jobs", ["owner"])
    op.create_index("ix_jobs_turn", "jobs", ["priority", "turn"])


def _create_job_tables() -> None:
    op.create_table(
        "idempotency_keys",
        sa.Column("owner", sa.String(), primary_key=True),
        sa.Column("key", sa.String(), primary_key=True),
        sa.Column("request_sha256", sa.String(), nullable=False),
        sa.Column("job_id", sa.String(), sa.ForeignKey("jobs.id"), nullable=False),
        sa.Column("created_at", sa.BigInteger(), nullable=False),
    )
    op.create_table(
        "checkpoints",
        sa.Column("seq", _ROW_NUMBER, primary_key=True, autoincrement=True),
        sa.Column("id", sa.String(), nullable=False, unique=True),
        sa.Column("job_id", sa.String(), sa.ForeignKey("jobs.id"), nullable=False, index=True),
        sa.Column("created_at", sa.BigInteger(), nullable=False),
        sa.Column("step", sa.BigInteger(), nullable=False),
        sa.Column("model_id", sa.String(), nullable=False),
        sa.Column("metrics", sa.JSON(), nullable=False),
        sa.UniqueConstraint("job_id", "step"),
    )


def _create_lineage_tables() -> None:
    op.create_table(
        "runs",
        sa.Column("seq", _ROW_NUMBER, primary_key=True, autoincrement=True),
        sa.Column("id", sa.String(), nullable=False, unique=True),
        sa.Column("job_id", sa.String(), sa.ForeignKey("jobs.id"), nullable=False, index=True),
        sa.Column("job_type", sa.String(), nullable=False),
        sa.Column("name", sa.String(), nullable=False),
        sa.Column("started_at", sa.BigInteger(), nullable=False),
        sa.Column("finished_at", sa.BigInteger(), nullable=False),
        *(sa.Column(name, sa.JSON(), nullable=False) for name in ("config", "summary", "history", "tables")),
        sa.UniqueConstraint("job_id", "job_type"),
    )
    op.create_table(
        "artifacts",
        sa.Column("seq", _ROW_NUMBER, primary_key=True, autoincrement=True),
        sa.Column("id", sa.String(), nullable=False, unique=True),
        sa.Column("type", sa.String(), nullable=False),
        sa.Column("name", sa.String(), nullable=False),
        sa.Column("version", sa.Integer(), nullable=False),
        sa.Column("digest", sa.String(), nullable=False),
        sa.Column("created_at", sa.BigInteger(), nullable=False),
        sa.Column("data", sa.JSON(), nullable=False),
        sa.UniqueConstraint("type", "name", "digest"),
        sa.UniqueConstraint("type", "name", "version"),
    )
    op.create_table(
        "run_artifacts",
        sa.Column("run_seq", _ROW_NUMBER, sa.ForeignKey("runs.seq"), primary_key=True),
        sa.Column("artifact_seq", _ROW_NUMBER, sa.ForeignKey("artifacts.seq"), primary_key=True),
        sa.Column("is_output", sa.Boolean(), primary_key=True),
    )
    op.create_table(
        "deliveries",
        sa.Column("job_id", sa.String(), sa.ForeignKey("jobs.id"), primary_key=True),
        sa.Column("tracker", sa.String(), primary_key=True),
        sa.Column("status", sa.String(), nullable=False, index=True),
        sa.Column("tries", sa.Integer(), nullable=False),
        sa.Column("not_before_ms", sa.BigInteger(), nullable=False),
        sa.Column("options", sa.JSON(), nullable=False),
        sa.Column("outcome", sa.String()),
    )
