from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import select, text
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import IntegrityError

from serve.database import connection as connection_module
from serve.database.connection import Database, now_ms, patiently, read_clock_ms
from serve.database.tables import Base, FileRow, JobRow
from serve.errors import DiskFull, InvalidRequest, StoreUnavailable
from tests.postgres import PostgresServer, is_installed

POSTGRESQL, SQLITE = postgresql.dialect(), sqlite.dialect()  # type: ignore[no-untyped-call]


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    database = Database(f"sqlite:///{tmp_path / 'rookery.db'}")
    yield database
    database.close()


def test_f9_commits_are_durable_and_readers_do_not_wait_for_writers(database: Database) -> None:
    with database.write() as writing, database.read() as reading:
        assert reading.connection().exec_driver_sql("PRAGMA journal_mode").scalar() == "wal"
        assert writing.connection().exec_driver_sql("PRAGMA synchronous").scalar() == 2  # FULL
        assert reading.scalars(select(JobRow)).all() == []


def test_f25_locked_database_is_reported_as_unavailable(
    tmp_path: Path, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection_module, "BUSY_TIMEOUT_MS", 50)
    database.close()  # connections made from now on wait 50 ms
    holder = sqlite3.connect(tmp_path / "rookery.db", isolation_level=None)
    holder.execute("BEGIN IMMEDIATE")
    try:
        with pytest.raises(StoreUnavailable) as caught, database.write() as session:
            read_clock_ms(session)
        assert caught.value.retry_after_s
    finally:
        holder.close()
    with database.write() as session:
        assert read_clock_ms(session)


def test_f8_full_disk_of_the_database_is_said_to_be_one(tmp_path: Path) -> None:
    database = Database(f"sqlite:///{tmp_path / 'rookery.db'}")
    with pytest.raises(DiskFull), database.write() as session:
        pages = session.scalar(text("PRAGMA page_count"))
        session.execute(text(f"PRAGMA max_page_count = {pages}"))  # as if the disk ended there
        session.execute(text("CREATE TABLE more (line TEXT)"))
        session.execute(text("INSERT INTO more VALUES (:line)"), {"line": "x" * 100_000})
    database.close()


def test_a_mistake_of_ours_is_not_taken_for_a_database_that_is_away(database: Database) -> None:
    with pytest.raises(IntegrityError) as caught, database.write() as session:
        session.add_all(FileRow(id="file-1", filename="said", num_bytes=1, created_at=0, purpose="bot") for _ in "ab")
    assert "said" not in str(caught.value)


def test_f25_what_is_done_patiently_outlasts_a_lock(
    tmp_path: Path, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection_module, "BUSY_TIMEOUT_MS", 50)
    database.close()
    holder = sqlite3.connect(tmp_path / "rookery.db", isolation_level=None, check_same_thread=False)
    holder.execute("BEGIN IMMEDIATE")
    tries = 0

    def read() -> int:
        nonlocal tries
        tries += 1
        with database.write() as session:
            return read_clock_ms(session)

    release = threading.Timer(0.5, holder.close)
    release.start()
    assert patiently(read, 30.0) > 0 and tries > 1
    release.join()


def test_f25_patience_ends(database: Database) -> None:
    def fail() -> None:
        raise StoreUnavailable("Away.")

    with pytest.raises(StoreUnavailable):
        patiently(fail, 0.05)


def test_f25_restarted_postgresql_is_found_again() -> None:
    if not is_installed():
        pytest.skip("PostgreSQL's initdb and postgres are not on the PATH")
    server = PostgresServer()
    database = Database(server.create_database())
    try:
        with database.read() as session:
            before = read_clock_ms(session)
        server.stop()
        with pytest.raises(StoreUnavailable), database.write() as session:
            read_clock_ms(session)
        server.start()
        with database.write() as session:
            assert read_clock_ms(session) >= before
    finally:
        database.close()
        server.close()


def test_bad_database_url_is_refused_without_showing_its_password() -> None:
    with pytest.raises(InvalidRequest) as caught:
        Database("nosuch://user:secret@host/db")
    assert "secret" not in str(caught.value)


def test_statements_are_right_for_both_databases() -> None:
    query = select(JobRow.id, now_ms()).with_for_update(skip_locked=True)
    assert "julianday" in str(query.compile(dialect=SQLITE))
    compiled = str(query.compile(dialect=POSTGRESQL))
    assert "clock_timestamp()" in compiled and "FOR UPDATE SKIP LOCKED" in compiled
    for table in Base.metadata.tables.values():
        for column in table.columns:
            if column.name == "seq":
                assert str(column.type.compile(POSTGRESQL)) == "BIGINT"
                assert str(column.type.compile(SQLITE)) == "INTEGER"
