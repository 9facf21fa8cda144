"""The index against the folders: whatever happens to either, what is listed is what is there."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from serve.errors import ModelNotFound
from serve.store.disk import locked
from serve.store.index import INDEX, Index
from serve.store.marks import PRIVATE, set_mark
from serve.types import EVERYBODY, ModelInfo, Visibility
from tests.store.disk_world import Disk, list_all, list_by_pages, list_ids

# --- What others do -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.usefixtures("by_index_alone")
def test_listing_is_what_the_folders_say_whatever_was_done_to_them(disk: Disk, seed: int) -> None:
    chance = random.Random(seed)
    names = ["a/x", "a/X", "a/y_1", "A/z", "b/x.y", "b/n-1", "lone", "base/Fledgling"]

    def here(prefix: str = "") -> str | None:
        found = sorted(one for one in names if (disk.models / one).is_dir() and one.startswith(prefix))
        return chance.choice(found) if found else None

    def publish(name: str) -> None:
        if name != "base/Fledgling":  # that one comes with the program
            facts: dict[str, Any] = {"tags": ["t"]} if chance.random() < 0.5 else {}
            facts |= {"checkpoint_step": 1} if chance.random() < 0.2 else {}
            disk.publish(name, number=chance.randrange(1000), by=chance.randrange(2), **facts)

    def put(name: str) -> None:
        if "/" in name and not (disk.models / name / "main").exists():
            disk.put(name, number=chance.randrange(9))

    def rename(name: str) -> None:
        new = f"{name[:-1]}{chance.choice('qrs')}"
        if not (disk.models / new).exists():
            os.rename(disk.models / name, disk.models / new)
            names.append(new)

    def unname(name: str) -> None:
        (disk.models / name / "main").unlink(missing_ok=True)

    def mark(name: str) -> None:
        with contextlib.suppress(Exception):
            disk.stores[chance.randrange(2)].set_visibility(name, chance.choice(list(Visibility)))

    def drop(name: str) -> None:
        with contextlib.suppress(ModelNotFound):
            for found in disk.stores[0].list_revisions(name)[:1]:
                disk.stores[chance.randrange(2)].drop_revision(name, found.revision)

    def delete(name: str) -> None:
        disk.stores[chance.randrange(2)].delete_model(name.upper() if chance.random() < 0.2 else name)

    for _ in range(25):
        done: Callable[[str], None] = chance.choice(
            [publish, publish, publish, put, rename, unname, mark, drop, delete]
        )
        name = chance.choice(names) if done in (publish, put) else here("a" if done is rename else "")
        if name and not (name == "base/Fledgling" and done is not put):
            done(name)
        disk.check()
    disk.check(viewer=EVERYBODY)
    disk.check(tags=("t",))
    disk.check(owner="A")


@pytest.mark.usefixtures("by_index_alone")
def test_crash_before_the_index_follows_is_healed(disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a/x", "a/y", "a/z"):
        disk.publish(name)
    disk.publish("a/hidden", checkpoint_step=3)
    disk.check()
    with monkeypatch.context() as crashing:
        crashing.setattr(Index, "following", lambda *args: contextlib.nullcontext())
        disk.stores[0].set_visibility("a/x", Visibility.PRIVATE)
        disk.stores[0].delete_model("a/y")
        disk.publish("a/new", number=5)
        disk.publish("a/hidden", number=6)
        disk.publish("c/new", number=7)
    disk.check()
    disk.check(query="new")


@pytest.mark.usefixtures("by_index_alone")
def test_hand_put_folder_is_listed_as_its_files_are_now(disk: Disk) -> None:
    disk.put("a/dropped", handles=["one"])
    assert list_all(disk.stores[0], query="dropped")[0].handles == ("one",)
    disk.put("a/dropped", handles=["two"])
    for store in disk.stores:
        assert list_all(store, query="dropped")[0].handles == ("two",)


def test_what_was_listed_once_is_listed_again_without_opening_it(disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(5):
        disk.publish(f"a/x{number}", number=number)
    expected = list_all(disk.stores[1], owner="a")

    def opened(*args: object, **kwargs: object) -> ModelInfo:
        raise AssertionError("a model was opened")

    monkeypatch.setattr("serve.store.listing.describe", opened)
    assert list_all(disk.stores[1], owner="a") == expected


# --- While another writes -------------------------------------------------------------------------------------


@contextlib.contextmanager
def _locked_elsewhere(disk: Disk) -> Iterator[None]:
    """Somebody else holds the store's lock all the time."""
    holds, is_over = threading.Event(), threading.Event()

    def hold() -> None:
        with locked(disk.models / ".lock"):
            holds.set()
            is_over.wait(20)

    holder = threading.Thread(target=hold)
    holder.start()
    holds.wait()
    try:
        yield
        assert not is_over.is_set() and holder.is_alive(), "somebody waited for the lock"
    finally:
        is_over.set()
        holder.join()


def test_readers_never_wait_for_who_is_writing(disk: Disk) -> None:
    disk.publish("a/Ada", number=1, tags=["t"])
    disk.publish("a/private", number=2)
    disk.check()
    store = disk.stores[0]
    with _locked_elsewhere(disk):
        disk.put("b/new", tags=["t"])
        disk.put("a/put", tags=["t"])
        set_mark(disk.models / "a/private", PRIVATE, True)
        assert store.resolve("A/ADA").model_id == "a/Ada" and store.resolve("b/new").model_id == "b/new"
        with pytest.raises(ModelNotFound):
            store.resolve("c/absent")
        assert list_ids(store, owner="a", viewer=EVERYBODY) == ["a/Ada"]
        assert list_ids(store, newest_first=True, tags=("t",)) == ["a/Ada"]
    disk.check()
    with _locked_elsewhere(disk):
        (disk.models / INDEX).unlink()
        assert store.resolve("A/ADA").model_id == "a/Ada" and store.resolve("A/pUT").model_id == "a/put"
    disk.check()


def test_models_that_nobody_may_describe_now_are_listed_as_they_are(disk: Disk) -> None:
    for number in range(9):
        disk.publish(f"a/x{number}", number=number, tags=["t"])
    (disk.models / INDEX).unlink()
    first, second = disk.stores
    first.resolve("a/x1")
    with pytest.raises(ModelNotFound):
        first.resolve("a/absent")  # now the names are known
    with _locked_elsewhere(disk):
        found = [info.model_id for info in list_by_pages(second, 2, newest_first=True, tags=("t",))]
        assert found == [f"a/x{number}" for number in reversed(range(9))]
        assert list_ids(second, owner="a") == found[::-1]


def test_all_models_are_described_in_the_background(disk: Disk) -> None:
    for number in range(5):
        disk.publish(f"a/x{number}", number=number)
    (disk.models / INDEX).unlink()
    disk.stores[0].describe_in_background()
    for thread in [one for one in threading.enumerate() if one.name == "describe-models"]:
        thread.join()
    with contextlib.closing(sqlite3.connect(disk.models / INDEX)) as db:
        assert db.execute("SELECT count(*), count(created_at) FROM models").fetchone() == (5, 5)
    disk.check()


@pytest.mark.usefixtures("by_index_alone")
def test_many_names_come_and_go_in_several_transactions(disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serve.store.index._NAMES_AT_ONCE", 3)
    for number in range(10):
        disk.put(f"a/x{number}")
        disk.put(f"b/x{number}")
    disk.check()
    for number in range(8):
        disk.take(f"a/x{number}")
    shutil.rmtree(disk.models / "b")
    disk.check()


def test_threads_that_write_and_read_while_the_index_vanishes_do_not_wait_for_each_other(disk: Disk) -> None:
    disk.publish("a/x")
    store, failures = disk.stores[0], list[BaseException]()

    def use(number: int) -> None:
        try:
            for _ in range(20):
                (disk.models / INDEX).unlink(missing_ok=True)
                store.set_visibility("A/X", list(Visibility)[number % 3])  # holds the lock, and looks into the index
                assert list_ids(store, owner="a") == ["a/x"]
        except BaseException as exc:
            failures.append(exc)

    threads = [threading.Thread(target=use, args=(number,), daemon=True) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not failures and not any(thread.is_alive() for thread in threads)


# --- What costs nothing ---------------------------------------------------------------------------------------


def _writes(monkeypatch: pytest.MonkeyPatch) -> list[None]:
    """One for each transaction from now on."""
    written, writing = list[None](), Index.writing

    def counted(index: Index, *, wait: bool = True) -> contextlib.AbstractContextManager[sqlite3.Connection]:
        written.append(None)
        return writing(index, wait=wait)

    monkeypatch.setattr(Index, "writing", counted)
    return written


def test_absent_model_is_looked_up_without_writing_even_where_the_clock_was_set_back(
    disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk.publish("a/x")
    for folder in (disk.models / "a", disk.models):
        os.utime(folder, (time.time() + 3600,) * 2)
    for store in disk.stores:
        with pytest.raises(ModelNotFound):
            store.resolve("a/absent")
    written = _writes(monkeypatch)
    with pytest.raises(ModelNotFound):
        disk.stores[0].resolve("a/absent")
    assert written == []


def test_homes_without_a_model_are_looked_at_in_turns(disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serve.store.listing._SMALL_BATCH", 10)
    for number in range(25):
        (disk.models / f"a/x{number:02}").mkdir(parents=True)
    store = disk.stores[0]
    assert list_ids(store, owner="a") == []
    with monkeypatch.context() as crashing:
        crashing.setattr(Index, "following", lambda *args: contextlib.nullcontext())
        disk.publish("a/x23")
    assert any(list_ids(store, owner="a") == ["a/x23"] for _ in range(3))
