"""What `rookery doctor` finds, by real sockets, folders and processes."""

from __future__ import annotations

import json
import socket
import sqlite3
from dataclasses import replace
from pathlib import Path

import pytest

from deployments import running
from deployments.cli import doctor
from serve.database.connection import SCHEMA, Database
from serve.settings import Settings
from tests.deployments.cli_world import Rookery, another_program
from tests.deployments.conftest import BASE, import_tiny_model


def test_a_sound_machine_has_no_problem(rookery: Rookery, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ROOKERY_HUB_ENABLED", "0")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    done = rookery("doctor", "--json", "--data", tmp_path / "new", "--port", port)
    found = json.loads(done.out)
    assert (done.code, found["ok"]) == (0, True), found
    names = [one["name"] for one in found["checks"]]
    assert names[:3] == ["settings", "Python", "packages"] and len(names) == len(set(names)) == 16
    assert all(one["said"] and one["mark"] in ("ok", "note") for one in found["checks"])
    assert list(tmp_path.iterdir()) == []  # it changes nothing
    lines = rookery("doctor", "--data", tmp_path, "--port", port).out.splitlines()
    assert [line.split()[0] for line in lines if line[0] != " "] == [one["mark"] for one in found["checks"]]


def test_a_wrong_setting_is_a_problem_and_the_rest_is_still_looked_at(
    rookery: Rookery, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ROOKERY_HUB_ENABLED", "maybe")
    settings, finding = doctor.read_settings(tmp_path)
    assert (finding.mark, settings.data) == ("problem", tmp_path) and "ROOKERY_HUB_ENABLED='maybe'" in finding.said


def test_a_port_tells_whose_it_is(tmp_path: Path) -> None:
    with another_program() as url:
        port = int(url.rpartition(":")[2])
        taken = doctor.check_port(port, tmp_path)
    assert taken.mark == "problem" and str(port) in taken.said and f"--port {port + 1}" in taken.advice
    assert doctor.check_port(port, tmp_path).mark == "ok"
    with running.announced(tmp_path, "http://127.0.0.1:1"):
        assert "http://127.0.0.1:1" in doctor.check_port(port, tmp_path).said


def test_a_database_is_read_and_not_made(tmp_path: Path) -> None:
    settings = Settings(data=tmp_path)
    assert doctor.check_database(settings).said == "SQLite, not there yet" and list(tmp_path.iterdir()) == []
    Database(settings.sql_url).close()
    assert doctor.check_database(settings) == doctor.Finding("database", "ok", f"sqlite, schema {SCHEMA}")
    with sqlite3.connect(tmp_path / "rookery.db") as connection:
        connection.execute("UPDATE alembic_version SET version_num = '9999'")
    connection.close()
    newer = doctor.check_database(settings)
    assert newer.mark == "problem" and "newer release" in newer.said
    (tmp_path / "rookery.db").write_bytes(b"no database at all" * 100)
    assert doctor.check_database(settings).mark == "problem"


@pytest.mark.parametrize("url", ["postgresql+psycopg://ada:secret@127.0.0.1:9/bots", "no address", "oracle+x://a/b"])
def test_a_database_that_cannot_be_had_is_a_problem_and_its_password_is_not_shown(url: str) -> None:
    found = doctor.check_database(Settings(database_url=url))
    assert found.mark == "problem" and "secret" not in f"{found.said} {found.advice}"


def test_a_base_model_is_here_or_can_be_fetched_or_is_a_problem(tmp_path: Path) -> None:
    assert doctor.check_base(Settings(data=tmp_path, hub_enabled=False)).mark == "ok"
    assert doctor.check_base(Settings(data=tmp_path, base="nobody/none")).mark == "note"
    for base in ("nobody/none", "../.."):
        assert doctor.check_base(Settings(data=tmp_path, base=base, hub_enabled=False)).mark == "problem"
    assert list(tmp_path.iterdir()) == []
    import_tiny_model(tmp_path, BASE)
    assert doctor.check_base(Settings(data=tmp_path, base=BASE, hub_enabled=False)).mark == "ok"


def test_a_data_folder_that_cannot_be_written_is_a_problem() -> None:
    found = doctor.check_data_folder(Path("/proc/nowhere/data"))
    assert found.mark == "problem" and "--data" in found.advice


def test_a_data_folder_that_is_not_there_is_not_made(tmp_path: Path) -> None:
    found = doctor.check_data_folder(tmp_path / "a" / "b")
    assert found.mark != "problem" and "not there yet" in found.said and list(tmp_path.iterdir()) == []


def test_sqlite_in_a_folder_that_machines_share_is_a_note(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Settings(data=tmp_path / "new")
    assert doctor.check_sharing(settings).mark == "ok"
    monkeypatch.setattr(doctor, "is_shared", lambda device: device == tmp_path.stat().st_dev)
    jobs = doctor.check_sharing(settings)
    assert jobs.mark == "note" and "ROOKERY_DATABASE_URL" in jobs.advice
    settings = replace(settings, database_url="postgresql://server/rookery")
    index = doctor.check_sharing(settings)
    assert index.mark == "note" and "ROOKERY_CACHE" in index.advice
    assert doctor.check_sharing(replace(settings, cache="/var/cache/rookery")).mark == "ok"


def test_a_hub_that_is_not_reachable_is_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    assert doctor.check_hub(Settings(hub_endpoint="http://127.0.0.1:9")).mark == "note"
    assert doctor.check_hub(Settings(hub_endpoint="no address")).mark == "note"
    assert doctor.check_hub(Settings(hub_enabled=False)).mark == "ok"
    with another_program() as url:
        assert doctor.check_hub(Settings(hub_endpoint=url)).mark == "ok"


def test_packages_are_held_against_the_pins() -> None:
    missing, others, num = doctor._compare_versions(
        ["rich==0.1", "typer", "no-such-package-here==1", 'wandb==9; extra == "wandb"']
    )
    assert (missing, num) == (["no-such-package-here"], 3)
    assert len(others) == 1 and others[0].startswith("rich ") and others[0].endswith("(==0.1)")


@pytest.mark.parametrize(
    ("keys", "sent", "mark"),
    [
        ("", "", "ok"),
        ("short", "short", "note"),
        ("a-key-of-many-letters,another-of-many-letters", "another-of-many-letters", "ok"),
        ("a-key-of-many-letters", "", "note"),
    ],
)
def test_keys_are_looked_at_and_never_shown(keys: str, sent: str, mark: str) -> None:
    found = doctor.check_keys(Settings(api_keys=keys, api_key=sent))
    assert found.mark == mark
    assert not any(key and key in f"{found.said} {found.advice}" for key in keys.split(",") if len(key) > 8)


def test_a_gpu_that_is_asked_for_has_to_be_there() -> None:
    import torch

    assert doctor.check_gpu("cuda").mark == ("ok" if torch.cuda.is_available() else "problem")
    assert doctor.check_gpu("auto").mark == "ok"
