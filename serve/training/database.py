"""The tables behind files and jobs, and transactions on them: SQLite by default, PostgreSQL by URL.

Knows tables and transactions; what the states of a job mean is in `serve.training.jobs`. Time is the database's
own clock (UTC), so that workers whose clocks disagree still agree on whether a lease has ended.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import JSON, BigInteger, Connection, Engine, ForeignKey, Integer, create_engine, event, select, text
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, NoSuchModuleError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column
from sqlalchemy.sql.expression import FunctionElement

from serve.errors import InvalidRequest, StoreUnavailable

BUSY_TIMEOUT_MS = 5_000
RETRY_AFTER_S = 5.0
_SCHEMA_LOCK = 7_294_001  # any constant: PostgreSQL's advisory lock under which tables are created

# SQLite counts rows up by itself only where the key is exactly INTEGER (64 bits there anyway).
_RowNumber = Integer().with_variant(BigInteger(), "postgresql")


class Base(DeclarativeBase):
    """Rows have a `seq`, which gives their order and is never shown, and an `id`, which is."""


class FileRow(Base):
    __tablename__ = "files"

    seq: Mapped[int] = mapped_column(_RowNumber, primary_key=True, autoincrement=True)
    id: Mapped[str] = mapped_column(unique=True)
    filename: Mapped[str]
    num_bytes: Mapped[int] = mapped_column(BigInteger)
    created_at: Mapped[int] = mapped_column(BigInteger)
    purpose: Mapped[str]


class JobRow(Base):
    __tablename__ = "jobs"

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
    # The lease. `fence` only rises: whoever holds a lower one has been replaced.
    fence: Mapped[int] = mapped_column(BigInteger, default=0)
    attempt: Mapped[int] = mapped_column(default=0)
    worker: Mapped[str | None]
    lease_until_ms: Mapped[int] = mapped_column(BigInteger, default=0)
    not_before_ms: Mapped[int] = mapped_column(BigInteger, default=0)
    cancel_requested: Mapped[bool] = mapped_column(default=False)
    publication: Mapped[dict[str, str] | None] = mapped_column(JSON(none_as_null=True))  # what an attempt may publish


class JobLabelRow(Base):
    """A job's `metadata`, a pair a row, so that jobs can be found by it in either database."""

    __tablename__ = "job_labels"

    job_seq: Mapped[int] = mapped_column(ForeignKey("jobs.seq"), primary_key=True)
    key: Mapped[str] = mapped_column(primary_key=True)
    value: Mapped[str]


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


class now_ms(FunctionElement[int]):  # noqa: N801  (an SQL function)
    """Milliseconds since 1970 by the database's clock."""

    type = BigInteger()
    inherit_cache = True


@compiles(now_ms, "sqlite")
def _now_ms_sqlite(element: Any, compiler: Any, **options: Any) -> str:
    return "CAST((julianday('now') - 2440587.5) * 86400000 AS INTEGER)"


@compiles(now_ms, "postgresql")
def _now_ms_postgresql(element: Any, compiler: Any, **options: Any) -> str:
    return "CAST(EXTRACT(EPOCH FROM clock_timestamp()) * 1000 AS BIGINT)"


class Database:
    """One SQL database. Transactions are short; both kinds raise StoreUnavailable when it cannot be reached."""

    def __init__(self, url: str) -> None:
        """Creates missing tables. Raises: InvalidRequest for a bad `url`; StoreUnavailable."""
        self._engine = _open(url)
        with self.write() as session:
            if self._engine.dialect.name == "postgresql":
                session.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _SCHEMA_LOCK})
            Base.metadata.create_all(session.connection())

    @contextmanager
    def read(self) -> Iterator[Session]:
        """A snapshot; nothing is written."""
        with _translated(), Session(self._engine) as session:
            yield session

    @contextmanager
    def write(self) -> Iterator[Session]:
        """A transaction that commits at the end of the block, and is durable then.

        On SQLite it takes the write lock at once: a reader that turns writer half-way would fail, not wait.
        """
        writing = self._engine.execution_options(rookery_write=True)
        with _translated(), Session(writing, expire_on_commit=False) as session, session.begin():
            yield session

    def close(self) -> None:
        self._engine.dispose()


def read_clock_ms(session: Session) -> int:
    return session.scalars(select(now_ms())).one()


@contextmanager
def _translated() -> Iterator[None]:
    try:
        yield
    except (DBAPIError, PoolTimeout) as exc:
        # The statement and its values stay out of the message: they hold what users sent.
        cause = type(exc.orig).__name__ if isinstance(exc, DBAPIError) else type(exc).__name__
        raise StoreUnavailable(
            f"The job database cannot be used now ({cause}); try again in {RETRY_AFTER_S:g} s.",
            retry_after_s=RETRY_AFTER_S,
        ) from exc


def _open(url: str) -> Engine:
    try:
        parsed = make_url(url)
        if parsed.get_backend_name() == "sqlite" and parsed.database:
            Path(parsed.database).parent.mkdir(parents=True, exist_ok=True)
        engine = create_engine(parsed, pool_pre_ping=parsed.get_backend_name() != "sqlite")
    except (ArgumentError, NoSuchModuleError, ModuleNotFoundError) as exc:
        raise InvalidRequest(
            "The database URL is not one that can be opened: it looks like 'sqlite:////data/rookery.db' or "
            "'postgresql+psycopg://user@host/name', with the driver installed.",
            param="database_url",
        ) from exc
    if engine.dialect.name == "sqlite":
        event.listen(engine, "connect", _configure_sqlite)
        event.listen(engine, "begin", _begin_sqlite)
    return engine


def _configure_sqlite(connection: Any, _record: Any) -> None:
    connection.isolation_level = None  # the driver opens no transactions: `_begin_sqlite` does
    for pragma in (f"busy_timeout={BUSY_TIMEOUT_MS}", "journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON"):
        connection.execute(f"PRAGMA {pragma}")


def _begin_sqlite(connection: Connection) -> None:
    writing = connection.get_execution_options().get("rookery_write", False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writing else "BEGIN")
