from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, Engine, create_engine, event, inspect, text

from serve.database import migrations
from serve.database.connection import SCHEMA, Database
from serve.database.migrations import upgrade
from serve.database.tables import Base
from serve.errors import InvalidRequest

_OLD_JOB = {
    "id": "ftjob-old",
    "request": json.dumps({"base_model": "gpt2", "files": [{"file_id": "file-old", "handle": "ada"}]}),
    "status": "queued",
    "result": json.dumps({"counts": {"ada": {"kept": 150}}}),
}


@contextmanager
def connected(url: str) -> Iterator[Connection]:
    engine = create_engine(url)
    with engine.begin() as connection:
        yield connection
    engine.dispose()


def make_as_first_release(url: str) -> None:
    """Its tables with a row in each, and no word of a version."""
    with connected(url) as connection:
        upgrade(connection, "0001")
        connection.execute(text("DROP TABLE alembic_version"))
        connection.execute(text("INSERT INTO files VALUES (1, 'file-old', 'a.txt', 9, 1000, 'fine-tune')"))
        columns = "seq, id, request, status, created_at, seed, result, fence, attempt, lease_until_ms, not_before_ms"
        connection.execute(
            text(
                f"INSERT INTO jobs ({columns}, cancel_requested) "
                "VALUES (1, :id, :request, :status, 1000, 7, :result, 3, 1, 0, 0, false)"
            ),
            _OLD_JOB,
        )
        connection.execute(text("INSERT INTO job_labels VALUES (1, 'run', 'first')"))
        connection.execute(
            text("INSERT INTO events VALUES (1, 'ftevent-old', 'ftjob-old', 1000, 'info', 'Hi.', 'message', '{}')")
        )


def test_the_newest_step_is_the_schema_that_the_program_wants() -> None:
    [folder] = migrations.__path__
    assert ScriptDirectory(folder).get_current_head() == SCHEMA


def test_steps_lead_to_exactly_the_tables_of_the_program(database_url: str) -> None:
    Database(database_url).close()
    with connected(database_url) as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True, "compare_server_default": True})
        assert compare_metadata(context, Base.metadata) == []


def test_f29_database_of_the_first_release_keeps_its_rows(database_url: str) -> None:
    make_as_first_release(database_url)
    database = Database(database_url)
    with database.read() as session:
        job = session.execute(text("SELECT * FROM jobs")).mappings().one()
        tables = {name: session.scalar(text(f"SELECT count(*) FROM {name}")) for name in ("files", "events")}
        label = session.execute(text("SELECT value FROM job_labels")).scalar_one()
    assert (job["id"], job["status"], job["fence"], job["attempt"]) == ("ftjob-old", "queued", 3, 1)
    assert (job["owner"], job["priority"], job["turn"], job["progress"]) == ("", 0, 0, 0)
    assert not job["pause_requested"]
    assert tables == {"files": 1, "events": 1} and label == "first"
    database.close()


def test_steps_taken_before_are_not_taken_again(database_url: str) -> None:
    make_as_first_release(database_url)
    for _ in range(2):
        Database(database_url).close()
    with connected(database_url) as connection:
        assert connection.scalar(text("SELECT version_num FROM alembic_version")) == SCHEMA


def test_step_that_fails_leaves_the_database_as_it_was(database_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make_as_first_release(database_url)

    def fail(*_arguments: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("alembic.op.create_index", fail)
        with pytest.raises(KeyboardInterrupt):
            Database(database_url)
    with connected(database_url) as connection:
        assert not inspect(connection).has_table("alembic_version")
        assert "turn" not in {column["name"] for column in inspect(connection).get_columns("jobs")}
    Database(database_url).close()


def test_database_of_a_newer_release_is_refused_and_left_alone(database_url: str) -> None:
    Database(database_url).close()
    with connected(database_url) as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    with pytest.raises(InvalidRequest, match="9999"):
        Database(database_url)


_OPEN = (
    "import sys; sys.stdin.readline(); from serve.database.connection import Database; Database(sys.argv[1]).close()"
)


def test_processes_that_open_an_old_database_at_once_all_find_it_new(database_url: str) -> None:
    make_as_first_release(database_url)
    openers = [
        subprocess.Popen([sys.executable, "-c", _OPEN, database_url], stdin=subprocess.PIPE, stderr=subprocess.PIPE)
        for _ in range(6)
    ]
    for opener in openers:
        assert opener.stdin is not None
        opener.stdin.write(b"\n")
        opener.stdin.flush()
    errors = [opener.communicate(timeout=60)[1].decode() for opener in openers]
    assert [opener.returncode for opener in openers] == [0] * 6, errors


def test_opening_a_database_that_is_up_to_date_is_one_look(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/rookery.db"
    Database(url).close()
    statements: list[str] = []

    def note(_connection: object, _cursor: object, statement: str, *_others: object) -> None:
        statements.append(statement)

    event.listen(Engine, "before_cursor_execute", note)
    started = time.perf_counter()
    try:
        Database(url).close()
    finally:
        event.remove(Engine, "before_cursor_execute", note)
    assert len([statement for statement in statements if not statement.startswith("BEGIN")]) <= 3, statements
    assert time.perf_counter() - started < 1.0


def test_opening_a_database_that_is_up_to_date_does_not_import_alembic(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/rookery.db"
    Database(url).close()
    code = (
        "import sys; from serve.database.connection import Database; Database(sys.argv[1]).close(); "
        "sys.exit('alembic' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, url], check=True)
