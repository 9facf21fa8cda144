"""`rookery migrate` on both kinds of databases."""

from __future__ import annotations

import json
import socket
import threading

import pytest
from sqlalchemy import create_engine, text

from serve.database.connection import SCHEMA, Database
from serve.database.migrations import upgrade
from tests.deployments.cli_world import Rookery
from tests.postgres import PostgresServer


@pytest.fixture
def named(database_url: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """The URL of a database that the settings name."""
    monkeypatch.setenv("ROOKERY_DATABASE_URL", database_url)
    return database_url


def at_first_schema(url: str) -> None:
    engine = create_engine(url)
    with engine.begin() as connection:
        upgrade(connection, "0001")
    engine.dispose()


def test_an_empty_database_gets_the_schema_and_a_second_time_changes_nothing(rookery: Rookery, named: str) -> None:
    kind = named.partition(":")[0].partition("+")[0]
    done = rookery("migrate")
    assert (done.code, done.out) == (0, f"The database ({kind}) has schema {SCHEMA} now; before it had none.\n")
    again = rookery("migrate")
    assert (again.code, again.out) == (0, f"The database ({kind}) has schema {SCHEMA} already.\n")
    assert not done.err + again.err


def test_an_older_one_is_brought_to_this_releases_schema(rookery: Rookery, named: str) -> None:
    at_first_schema(named)
    done = rookery("migrate", "--json")
    assert done.code == 0
    kind = named.partition(":")[0].partition("+")[0]
    assert json.loads(done.out) == {"object": "migration", "database": kind, "from": "0001", "to": SCHEMA}
    Database(named).close()


def test_a_newer_one_is_refused_and_left_as_it_is(rookery: Rookery, named: str) -> None:
    Database(named).close()
    engine = create_engine(named)
    with engine.begin() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    refused = rookery("migrate", "--wait", "60")
    assert refused.code == 1
    assert "made by a newer release" in refused.err
    with engine.connect() as connection:
        assert connection.scalar(text("SELECT version_num FROM alembic_version")) == "9999"
    engine.dispose()


def test_one_that_does_not_answer_ends_it_with_5(rookery: Rookery, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
    monkeypatch.setenv("ROOKERY_DATABASE_URL", f"postgresql+psycopg://rookery:secret@127.0.0.1:{port}/rookery")
    ended = rookery("migrate", "--wait", "0.3")
    assert ended.code == 5
    assert ended.err.startswith(
        "Waiting up to 0.3 s for the database (postgresql) ...\nrookery: The job database cannot"
    )
    assert "secret" not in ended.err


def test_it_waits_for_a_server_that_comes_later(
    rookery: Rookery, postgres: PostgresServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ROOKERY_DATABASE_URL", postgres.create_database())
    postgres.stop()
    starting = threading.Timer(0.5, postgres.start)
    starting.start()
    try:
        done = rookery("migrate", "--wait", "60")
    finally:
        starting.join()
    assert done.code == 0, done.err
    assert done.out == f"The database (postgresql) has schema {SCHEMA} now; before it had none.\n"
    assert done.err == "Waiting up to 60 s for the database (postgresql) ...\n"
