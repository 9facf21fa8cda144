"""The tables: files, jobs with their leases, events and checkpoints, the runs and artifacts that tell of them, keys.

What the states of a job mean is in `serve.training.jobs`. A change here needs a step in `migrations/`.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import JSON, BigInteger, ForeignKey, Index, Integer, UniqueConstraint, text
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

# SQLite counts rows up by itself only where the key is exactly INTEGER (64 bits there anyway).
_RowNumber = Integer().with_variant(BigInteger(), "postgresql")


class Base(DeclarativeBase):
    """Rows have a `seq`, which gives their order and is never shown, and an `id`, which is."""


# --- Files and jobs -----------------------------------------------------------------------------------------


class FileRow(Base):
    __tablename__ = "files"

    seq: Mapped[int] = mapped_column(_RowNumber, primary_key=True, autoincrement=True)
    id: Mapped[str] = mapped_column(unique=True)
    filename: Mapped[str]
    num_bytes: Mapped[int] = mapped_column(BigInteger)
    created_at: Mapped[int] = mapped_column(BigInteger)
    purpose: Mapped[str]
    owner: Mapped[str] = mapped_column(default="", server_default=text("''"), index=True)  # a tenant


class JobRow(Base):
    __tablename__ = "jobs"
    __table_args__ = (Index("ix_jobs_turn", "priority", "turn"),)

    seq: Mapped[int] = mapped_column(_RowNumber, primary_key=True, autoincrement=True)
    id: Mapped[str] = mapped_column(unique=True)
    request: Mapped[dict[str, Any]] = mapped_column(JSON)
    status: Mapped[str] = mapped_column(index=True)
    created_at: Mapped[int] = mapped_column(BigInteger)
    seed: Mapped[int] = mapped_column(BigInteger)
    started_at: Mapped[int | None] = mapped_column(BigInteger)
    finished_at: Mapped[int | None] = mapped_column(BigInteger)
    estimated_finish: Mapped[int | None] = mapped_column(BigInteger)
    fine_tuned_model: Mapped[str | None]
    trained_tokens: Mapped[int | None] = mapped_column(BigInteger)
    error_code: Mapped[str | None]
    error_message: Mapped[str | None]
    error_param: Mapped[str | None]
    result: Mapped[dict[str, Any]] = mapped_column(JSON, default=dict)
    # Whose turn it is: the highest priority first, then the lowest turn, then the oldest.
    owner: Mapped[str] = mapped_column(default="", server_default=text("''"), index=True)  # a name of the caller's key
    tenant: Mapped[str] = mapped_column(default="", server_default=text("''"), index=True)  # whose it is
    priority: Mapped[int] = mapped_column(default=0, server_default="0")
    turn: Mapped[int] = mapped_column(BigInteger, default=0, server_default="0")
    # The lease. `fence` only rises: whoever holds a lower one has been replaced.
    fence: Mapped[int] = mapped_column(BigInteger, default=0)
    attempt: Mapped[int] = mapped_column(default=0)  # since the job last made progress
    progress: Mapped[int] = mapped_column(BigInteger, default=0, server_default="0")  # the last step on the disk
    worker: Mapped[str | None]
    lease_until_ms: Mapped[int] = mapped_column(BigInteger, default=0)
    not_before_ms: Mapped[int] = mapped_column(BigInteger, default=0)
    cancel_requested: Mapped[bool] = mapped_column(default=False)
    pause_requested: Mapped[bool] = mapped_column(default=False, server_default="0")
    publication: Mapped[dict[str, str] | None] = mapped_column(JSON(none_as_null=True))  # what an attempt may publish


class JobLabelRow(Base):
    """A job's `metadata`, a pair a row, so that jobs can be found by it in either database."""

    __tablename__ = "job_labels"

    job_seq: Mapped[int] = mapped_column(ForeignKey("jobs.seq"), primary_key=True)
    key: Mapped[str] = mapped_column(primary_key=True)
    value: Mapped[str]


class IdempotencyRow(Base):
    """A request that was answered with a job: said again with the same key, it is answered with the same job."""

    __tablename__ = "idempotency_keys"

    owner: Mapped[str] = mapped_column(primary_key=True)
    key: Mapped[str] = mapped_column(primary_key=True)
    request_sha256: Mapped[str]
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"))
    created_at: Mapped[int] = mapped_column(BigInteger)


class EventRow(Base):
    __tablename__ = "events"

    seq: Mapped[int] = mapped_column(_RowNumber, primary_key=True, autoincrement=True)
    id: Mapped[str] = mapped_column(unique=True)
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"), index=True)
    created_at: Mapped[int] = mapped_column(BigInteger)
    level: Mapped[str]
    message: Mapped[str]
    type: Mapped[str]
    data: Mapped[dict[str, Any]] = mapped_column(JSON)


class CheckpointRow(Base):
    """A servable revision from the middle of a training. One a job and step, however often the step was reached."""

    __tablename__ = "checkpoints"
    __table_args__ = (UniqueConstraint("job_id", "step"),)

    seq: Mapped[int] = mapped_column(_RowNumber, primary_key=True, autoincrement=True)
    id: Mapped[str] = mapped_column(unique=True)
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"), index=True)
    created_at: Mapped[int] = mapped_column(BigInteger)
    step: Mapped[int] = mapped_column(BigInteger)
    model_id: Mapped[str]  # with its revision
    metrics: Mapped[dict[str, Any]] = mapped_column(JSON)


# --- Lineage ------------------------------------------------------------------------------------------------


class RunRow(Base):
    """What a job did, as experiment trackers tell it: one run to preprocess, one to train."""

    __tablename__ = "runs"
    __table_args__ = (UniqueConstraint("job_id", "job_type"),)

    seq: Mapped[int] = mapped_column(_RowNumber, primary_key=True, autoincrement=True)
    id: Mapped[str] = mapped_column(unique=True)
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"), index=True)
    job_type: Mapped[str]
    name: Mapped[str]
    started_at: Mapped[int] = mapped_column(BigInteger)
    finished_at: Mapped[int] = mapped_column(BigInteger)
    config: Mapped[dict[str, Any]] = mapped_column(JSON)
    summary: Mapped[dict[str, Any]] = mapped_column(JSON)
    history: Mapped[dict[str, Any]] = mapped_column(JSON)  # name of a column -> its values, a step each
    tables: Mapped[dict[str, Any]] = mapped_column(JSON)  # name -> {columns, data}


class ArtifactRow(Base):
    """One version of something that runs use or make. The same content under the same name is the same version."""

    __tablename__ = "artifacts"
    __table_args__ = (UniqueConstraint("type", "name", "digest"), UniqueConstraint("type", "name", "version"))

    seq: Mapped[int] = mapped_column(_RowNumber, primary_key=True, autoincrement=True)
    id: Mapped[str] = mapped_column(unique=True)
    type: Mapped[str]
    name: Mapped[str]
    version: Mapped[int]
    digest: Mapped[str]
    created_at: Mapped[int] = mapped_column(BigInteger)
    data: Mapped[dict[str, Any]] = mapped_column(JSON)


class RunArtifactRow(Base):
    __tablename__ = "run_artifacts"

    run_seq: Mapped[int] = mapped_column(ForeignKey("runs.seq"), primary_key=True)
    artifact_seq: Mapped[int] = mapped_column(ForeignKey("artifacts.seq"), primary_key=True)
    is_output: Mapped[bool] = mapped_column(primary_key=True)


class DeliveryRow(Base):
    """A job whose runs are still to be told, or were, to a tracker outside. Trackers fail; trainings do not."""

    __tablename__ = "deliveries"

    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"), primary_key=True)
    tracker: Mapped[str] = mapped_column(primary_key=True)
    status: Mapped[str] = mapped_column(index=True)  # waiting | done | failed
    tries: Mapped[int] = mapped_column(default=0)
    not_before_ms: Mapped[int] = mapped_column(BigInteger, default=0)
    options: Mapped[dict[str, Any]] = mapped_column(JSON, default=dict)  # project, entity, tags of `integrations`
    outcome: Mapped[str | None]  # where it can be seen, or why it failed


# --- Keys ---------------------------------------------------------------------------------------------------


class ApiKeyRow(Base):
    """A key's terms, and what its secret is known by. Times are Unix seconds."""

    __tablename__ = "api_keys"

    seq: Mapped[int] = mapped_column(_RowNumber, primary_key=True, autoincrement=True)
    id: Mapped[str] = mapped_column(unique=True)
    name: Mapped[str]
    tenant: Mapped[str]
    scopes: Mapped[list[str]] = mapped_column(JSON)
    limits: Mapped[dict[str, Any]] = mapped_column(JSON)  # those that the key has of its own
    created_at: Mapped[int] = mapped_column(BigInteger)
    expires_at: Mapped[int | None] = mapped_column(BigInteger)
    revoked_at: Mapped[int | None] = mapped_column(BigInteger)
    last_used_at: Mapped[int | None] = mapped_column(BigInteger)  # to the minute
    hash: Mapped[str]  # of its secret, under the server's own
    previous_hash: Mapped[str | None]  # of the secret that a new one replaced, which is good
    previous_until: Mapped[int | None] = mapped_column(BigInteger)  # until then
