"""The script of the nightly dump, run as it stands in the manifest: by a real PostgreSQL, and by none."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.k8s.rendered import Rendering, render
from tests.postgres import PostgresServer, is_installed

_DAY_S = 86_400


@pytest.fixture
def script(kubectl: str) -> str:
    return script_of(render("ha"))


@pytest.fixture
def server() -> Iterator[PostgresServer]:
    if not is_installed():
        pytest.skip("PostgreSQL's initdb and postgres are not on the PATH")
    server = PostgresServer()
    yield server
    server.close()


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """A dump of a month ago."""
    path = tmp_path / "rookery-20260101T031700Z.dump"
    path.write_bytes(b"all that there is")
    a_month_ago = path.stat().st_mtime - 30 * _DAY_S
    os.utime(path, (a_month_ago, a_month_ago))
    return path


def script_of(rendering: Rendering) -> str:
    [job] = rendering.of("CronJob")
    [container] = job["spec"]["jobTemplate"]["spec"]["template"]["spec"]["containers"]
    assert container["command"][:2] == ["sh", "-c"]
    return str(container["command"][2])


def run(script: str, folder: Path, **env: object) -> int:
    if not all(shutil.which(name) for name in ("psql", "pg_dump")):
        pytest.skip("psql and pg_dump are not on the PATH; Debian has them as postgresql-client")
    texts = {name: str(value) for name, value in env.items()}
    command = ["sh", "-c", script.replace("/backup", str(folder))]
    return subprocess.run(command, env={"PATH": os.environ["PATH"], **texts}, check=False, timeout=60).returncode


def test_without_postgresql_the_job_fails_and_old_dumps_stay(script: str, tmp_path: Path, old: Path) -> None:
    assert run(script, tmp_path, PGHOST=tmp_path / "nowhere", PGUSER="rookery", PGDATABASE="rookery") != 0
    assert list(tmp_path.iterdir()) == [old]


def test_a_dump_that_fails_fails_the_job_and_old_dumps_stay(
    script: str, tmp_path: Path, old: Path, server: PostgresServer
) -> None:
    server.create_database()
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "pg_dump").symlink_to("/bin/false")
    path = f"{programs}{os.pathsep}{os.environ['PATH']}"
    assert run(
        script, tmp_path, PATH=path, PGHOST="127.0.0.1", PGPORT=server.port, PGUSER="rookery", PGDATABASE="postgres"
    )
    assert old.exists() and not [one for one in tmp_path.glob("*.dump") if one != old]


def test_each_database_has_its_dump_and_then_the_old_ones_go(
    script: str, tmp_path: Path, old: Path, server: PostgresServer
) -> None:
    names = {server.create_database().rpartition("/")[2] for _ in range(2)}
    assert run(script, tmp_path, PGHOST="127.0.0.1", PGPORT=server.port, PGUSER="rookery", PGDATABASE="postgres") == 0
    assert {one.name.rpartition("-")[0] for one in tmp_path.iterdir()} == names
    assert all(one.suffix == ".dump" and one.read_bytes().startswith(b"PGDMP") for one in tmp_path.iterdir())
    assert not old.exists()
