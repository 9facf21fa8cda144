"""Transactions on the database, its schema and its clock: SQLite by default, PostgreSQL by URL.

Time is the database's own clock (UTC), so that workers whose clocks disagree still agree on whether a lease has ended.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from sqlalchemy import BigInteger, Connection, Engine, create_engine, event, inspect, select, text
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError, DataError, DBAPIError, IntegrityError, NoSuchModuleError, ProgrammingError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.orm import Session
from sqlalchemy.sql.expression import FunctionElement

from serve.errors import DiskFull, InvalidRequest, StoreUnavailable

SCHEMA = "0003"  # the newest of `migrations`, said here so that only an older database makes us import alembic
BUSY_TIMEOUT_MS = 5_000
RETRY_AFTER_S = 5.0
PATIENCE_S = 30.0  # with a database that is locked, read-only or restarting, where a result would be lost otherwise
# Any constants, each another: PostgreSQL's advisory locks under which the schema changes, artifacts are
# numbered, and jobs are created.
SCHEMA_LOCK = 7_294_001
NUMBERING_LOCK = 7_294_002
CREATION_LOCK = 7_294_003

_FULL = "53100"  # PostgreSQL's disk_full

T = TypeVar("T")


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
        """Brings the tables up to date. Raises: InvalidRequest for a bad `url` or newer tables; StoreUnavailable."""
        self._engine = _open(url)
        try:
            with self.read() as session:
                self.found_schema = _schema_of(session.connection())  # before this release's; None: no tables at all
            if self.found_schema != SCHEMA:
                self._upgrade()
        except BaseException:
            self.close()
            raise

    def _upgrade(self) -> None:
        with self.write() as session:
            take_lock(session, SCHEMA_LOCK)
            version = _schema_of(session.connection())  # again: another process may have been quicker
            if version is not None and version > SCHEMA:
                raise InvalidRequest(
                    f"The database was made by a newer release: its schema is {version[:16]}, and this release knows "
                    f"{SCHEMA}. Run the newer release, or name another database.",
                    param="database_url",
                )
            if version != SCHEMA:
                from serve.database.migrations import upgrade

                upgrade(session.connection())

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

    def scrub(self) -> bool:
        """Overwrites what deleted rows have left in the files; False where the database is too busy for that.

        SQLite writes itself anew, and empties its log. PostgreSQL marks the room as free, and writes over it in time.
        """
        if self._engine.dialect.name == "sqlite":
            with closing(self._engine.raw_connection()) as pooled, suppress(sqlite3.Error):
                driver: Any = pooled.driver_connection  # SQLAlchemy's begins a transaction: in one there is no VACUUM
                driver.execute("VACUUM")
                [(is_busy, _, _)] = driver.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
                return not is_busy
            return False
        with suppress(StoreUnavailable), _translated():
            with self._engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
                connection.execute(text("VACUUM"))
            return True
        return False

    def close(self) -> None:
        self._engine.dispose()


def read_clock_ms(session: Session) -> int:
    return session.scalars(select(now_ms())).one()


def take_lock(session: Session, key: int) -> None:
    """One at a time until this transaction ends. On SQLite any `write` is that already."""
    if session.connection().dialect.name == "postgresql":
        session.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": key})


def patiently(action: Callable[[], T], patience_s: float = PATIENCE_S) -> T:
    """Repeats `action` while the database cannot be used. Raises: StoreUnavailable when patience ends."""
    deadline = time.monotonic() + patience_s
    pause_s = 0.1
    while True:
        try:
            return action()
        except StoreUnavailable:
            if time.monotonic() + pause_s > deadline:
                raise
        time.sleep(pause_s)
        pause_s = min(2 * pause_s, 2.0)


def _schema_of(connection: Connection) -> str | None:
    if not inspect(connection).has_table("alembic_version"):
        return None
    version: str | None = connection.scalar(text("SELECT version_num FROM alembic_version"))
    return version


@contextmanager
def _translated() -> Iterator[None]:
    try:
        yield
    except (DataError, IntegrityError, ProgrammingError):
        raise  # a mistake of ours, which is the same the next time
    except (DBAPIError, PoolTimeout) as exc:
        # The statement and its values stay out of the message: they hold what users sent.
        orig = exc.orig if isinstance(exc, DBAPIError) else None
        if getattr(orig, "sqlite_errorcode", None) == sqlite3.SQLITE_FULL or getattr(orig, "sqlstate", "") == _FULL:
            message = "The disk of the job database is full. Delete what is not needed."
            raise DiskFull(message, retry_after_s=60) from exc
        cause = type(orig or exc).__name__
        raise StoreUnavailable(
            f"The job database cannot be used now ({cause}); try again in {RETRY_AFTER_S:g} s.",
            retry_after_s=RETRY_AFTER_S,
        ) from exc


def _open(url: str) -> Engine:
    try:
        parsed = make_url(url)
        if parsed.get_backend_name() == "sqlite" and parsed.database:
            _make_private(parsed.database)
        # Errors go to the log without the values of their statement: users sent them.
        engine = create_engine(parsed, pool_pre_ping=parsed.get_backend_name() != "sqlite", hide_parameters=True)
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


def _make_private(database: str) -> None:
    """A new file for this user alone, as SQLite then makes those beside it: it holds what people sent."""
    path = Path(database)
    path.parent.mkdir(parents=True, exist_ok=True)
    if not database.startswith((":memory:", "file:")) and not path.exists():
        with suppress(OSError):  # SQLite will say why
            path.touch(mode=0o600)


def _configure_sqlite(connection: Any, _record: Any) -> None:
    connection.isolation_level = None  # the driver opens no transactions: `_begin_sqlite` does
    for pragma in (f"busy_timeout={BUSY_TIMEOUT_MS}", "journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON"):
        connection.execute(f"PRAGMA {pragma}")
    connection.execute("PRAGMA secure_delete=ON")  # a row that is deleted is gone from the file too


def _begin_sqlite(connection: Connection) -> None:
    writing = connection.get_execution_options().get("rookery_write", False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writing else "BEGIN")
