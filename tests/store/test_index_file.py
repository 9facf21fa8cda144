"""The index's file: damaged, absent, not to be written, and written by several processes at once."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest

from serve.errors import ModelNotFound
from serve.store.index import INDEX
from serve.store.revisions import Store
from tests.store.disk_world import Disk, list_by_pages, list_ids

ROOT = Path(__file__).resolve().parents[2]


def _garbage(path: Path) -> None:
    path.write_bytes(b"no database " * 1000)


def _half(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _nothing(path: Path) -> None:
    path.write_bytes(b"")


def _holes(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[4096:] = bytes(len(content) - 4096)
    path.write_bytes(content)


def _other_version(path: Path) -> None:
    with contextlib.closing(sqlite3.connect(path)) as db:
        db.executescript("DROP TABLE models; PRAGMA user_version = 99")


def _other_tables(path: Path) -> None:
    with contextlib.closing(sqlite3.connect(path)) as db:
        db.executescript("DROP TABLE tags")


def _strange_rows(path: Path) -> None:
    with contextlib.closing(sqlite3.connect(path)) as db, db:
        db.execute("UPDATE models SET info = '[0, {\"x\": 1}]'")


def _missing(path: Path) -> None:
    path.unlink()


@pytest.mark.usefixtures("by_index_alone")
@pytest.mark.parametrize(
    "damage", [_garbage, _half, _nothing, _holes, _other_version, _other_tables, _strange_rows, _missing]
)
def test_damaged_index_is_made_anew_and_nobody_notices(disk: Disk, damage: Callable[[Path], None]) -> None:
    for number in range(40):
        disk.publish(f"a/x{number}", number=number, tags=["t"])
    disk.check()
    damage(disk.models / INDEX)
    assert disk.stores[0].resolve("A/X7").model_id == "a/x7"
    damage(disk.models / INDEX)
    disk.check(tags=("t",))
    damage(disk.models / INDEX)
    disk.publish("a/another")
    disk.stores[1].delete_model("a/x3")
    disk.check()


@pytest.mark.parametrize("seed", range(5))
def test_flipped_bits_of_the_index_are_no_error(disk: Disk, seed: int) -> None:
    for number in range(20):
        disk.publish(f"a/x{number}", number=number)
    disk.check()
    chance, path = random.Random(seed), disk.models / INDEX
    content = bytearray(path.read_bytes())
    for _ in range(200):
        content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    path.write_bytes(content)
    for store in disk.stores:
        list_ids(store), list_ids(store, newest_first=True), list_ids(store, query="x1"), list_ids(store, tags=("t",))
        assert store.resolve("a/x5").model_id == "a/x5"
    disk.publish("a/another")
    disk.stores[0].delete_model("a/x3")


def test_folder_that_cannot_be_written_is_served_by_looking_at_all_homes(tiny: Path) -> None:
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as undo:
        root = Path(name)
        root.chmod(0o755)
        disk = Disk(root, tiny)
        for number in range(5):
            disk.publish(f"a/x{number}", number=number, tags=["t"])
        shutil.rmtree(disk.models / ".staging")
        (disk.models / ".staging").mkdir()
        for path in root.rglob("*"):
            path.chmod(0o755 if path.is_dir() else 0o644)
        for folder in [root / "data", *(path for path in (root / "data").rglob("*") if path.is_dir())]:
            folder.chmod(0o555)
            undo.callback(folder.chmod, 0o755)
        if os.geteuid() == 0:  # who may do everything notices nothing
            os.seteuid(65534)
            undo.callback(os.seteuid, 0)
        with pytest.raises(OSError):
            (disk.models / "x").touch()
        disk.stores = [Store(root / "data", embedded=disk.embedded) for _ in range(2)]
        assert not (disk.models / INDEX).exists() or os.access(disk.models / INDEX, os.R_OK)
        disk.check()
        disk.check(query="x1")
        disk.check(tags=("t",))
        assert disk.stores[0].resolve("A/X3").model_id == "a/x3"
        with pytest.raises(ModelNotFound):
            disk.stores[0].resolve("a/nobody")
        assert [info.model_id for info in list_by_pages(disk.stores[0], 2, owner="a")] == [f"a/x{n}" for n in range(5)]


_PUBLISHER = textwrap.dedent("""
    import shutil, sys
    from pathlib import Path
    from serve.store.revisions import Store

    root, tiny, name = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
    store = Store(root, embedded={})
    for number in range(100):
        folder = Path(shutil.copytree(tiny, store.stage(), dirs_exist_ok=True))
        store.publish(f"{name[number % 2]}/{name}{number}", folder)
        if number % 10 == 9:
            store.delete_model(f"{name[1]}/{name}{number}")
""")


@pytest.mark.usefixtures("by_index_alone")
def test_two_processes_that_publish_at_once_are_both_followed(disk: Disk, tiny: Path) -> None:
    command = [sys.executable, "-c", _PUBLISHER, str(disk.models.parent), str(tiny)]
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    publishers = [subprocess.Popen([*command, name], env=environ) for name in ("ab", "ba")]
    while any(publisher.poll() is None for publisher in publishers):
        met = list_ids(disk.stores[0])
        assert met == sorted(set(met))
    assert [publisher.returncode for publisher in publishers] == [0, 0]
    assert len(list_ids(disk.stores[0])) == 1 + 2 * 90
    disk.check()
    with contextlib.closing(sqlite3.connect(disk.models / INDEX)) as db:
        assert db.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
