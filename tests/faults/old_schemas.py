"""Databases as earlier releases left them, opened by this one: their rows are there, and their jobs are worked off."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from alembic.script import ScriptDirectory
from sqlalchemy import MetaData, Table, create_engine, insert, inspect
from sqlalchemy.types import JSON

from serve.database import migrations
from serve.database.migrations import upgrade
from serve.errors import RookeryError
from serve.types import JobStatus
from tests.postgres import PostgresServer, is_installed
from tests.training.making import Training, made_up_texts

_FILE_ID, _JOB_ID = "file-old", "ftjob-old"
_REQUEST = {
    "base_model": "tiny/base",
    "files": [{"file_id": _FILE_ID, "handle": "ada"}],
    "hyperparameters": {"n_epochs": 1, "batch_size": None, "learning_rate_multiplier": None},
    "suffix": None,
    "seed": 7,
    "metadata": {},
}


def run(folder: Path) -> dict[str, Any]:
    """Each schema, on each kind of database that is here; the first also without a word of its version."""
    [where] = migrations.__path__
    schemas = sorted(step.revision for step in ScriptDirectory(where).walk_revisions())
    server = PostgresServer() if is_installed() else None
    wrong = []
    try:
        cases = [(schema, kind) for schema in schemas for kind in ("sqlite", *(["postgres"] if server else []))]
        for schema, kind in cases:
            work = folder / f"{schema}-{kind}"
            work.mkdir()
            url = f"sqlite:///{work / 'rookery.db'}" if server is None or kind == "sqlite" else server.create_database()
            try:
                _write(url, schema, work)
                _open(url, work)
            except (AssertionError, RookeryError) as exc:
                wrong.append(f"{schema} on {kind}: {exc}")
    finally:
        if server:
            server.close()
    return {
        "schemas": schemas,
        "databases": len(cases),
        "upgraded": len(cases) - len(wrong),
        "wrong": wrong,
    }


def _write(url: str, schema: str, work: Path) -> None:
    """A file and a job that waits, in the tables of that release: what it requires and this does not know is empty."""
    text = "\n".join(made_up_texts(150)).encode()
    (work / "uploads").mkdir()
    (work / "uploads" / _FILE_ID).write_bytes(text)
    known = {
        "files": {"id": _FILE_ID, "filename": "a.txt", "num_bytes": len(text), "created_at": 1, "purpose": "fine-tune"},
        "jobs": {"id": _JOB_ID, "request": _REQUEST, "status": "queued", "created_at": 1, "seed": 7, "result": {}},
    }
    engine = create_engine(url)
    with engine.begin() as connection:
        upgrade(connection, schema)
        if schema == "0001":  # databases of the first release say nothing of it
            connection.exec_driver_sql("DROP TABLE alembic_version")
        for name, values in known.items():
            table = Table(name, MetaData(), autoload_with=connection)
            for column in table.columns:
                if (
                    column.name not in values
                    and not column.nullable
                    and column.name != "seq"
                    and not column.server_default
                ):
                    values[column.name] = _empty(column.type.python_type)
                elif isinstance(column.type, JSON) is False and isinstance(values.get(column.name), dict):
                    values[column.name] = json.dumps(values[column.name])
            connection.execute(insert(table).values(**values))
        assert inspect(connection).has_table("jobs")
    engine.dispose()


def _empty(kind: type) -> Any:
    return kind()


def _open(url: str, work: Path) -> None:
    """Raises: AssertionError, RookeryError."""
    training = Training(work, url)
    try:
        assert training.jobs.get_file(_FILE_ID).filename == "a.txt"
        assert training.jobs.get_job(_JOB_ID).status is JobStatus.QUEUED
        new = training.create_job("eve")
        for job_id in (_JOB_ID, new.id):
            claim = training.queue.claim("worker", 30)
            assert claim is not None and claim.job.id == job_id, "another job was claimed first"
            training.queue.finish(claim, model_id="huggingtweets/ada", trained_tokens=1, result={})
            assert training.jobs.get_job(job_id).status is JobStatus.SUCCEEDED
    finally:
        training.close()
