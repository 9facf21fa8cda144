"""The index against the folders: whatever happens to either, what is listed is what is there."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import random
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypedDict, Unpack

import pytest

from serve.errors import ModelNotFound
from serve.store import index_search
from serve.store.disk import locked
from serve.store.homes import Homes
from serve.store.index import INDEX, Index, IndexUnavailable
from serve.store.listing import Listing
from serve.store.marks import PRIVATE, set_mark
from serve.store.revisions import Store
from serve.types import ModelInfo
from tests.fakes.models import write_tiny_gpt2

ROOT = Path(__file__).resolve().parents[2]
EVERYTHING = 10_000


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_gpt2(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def by_index_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing may be found by looking at all homes."""

    def looked_at_all(*args: object) -> Iterator[ModelInfo]:
        raise AssertionError("all homes were looked at")

    monkeypatch.setattr(Listing, "_from_disk", looked_at_all)
    monkeypatch.setattr(Homes, "ids", looked_at_all)


class Disk:
    """A data folder, and two stores on it, as two processes have them."""

    def __init__(self, root: Path, tiny: Path) -> None:
        self.models, self._tiny = root / "data/models", tiny
        self.embedded = {"base/fledgling": shutil.copytree(tiny, root / "fledgling")}
        self.stores = [Store(root / "data", embedded=self.embedded) for _ in range(2)]

    def publish(self, model_id: str, *, number: int = 0, by: int = 0, **facts: object) -> str:
        folder = shutil.copytree(self._tiny, self.stores[by].stage(), dirs_exist_ok=True)
        facts = {"created_at": 1_700_000_000 + number, **facts}
        (folder / "rookery.json").write_text(json.dumps({"number": number, **facts}))
        alias = None if "checkpoint_step" in facts else "main"
        return self.stores[by].publish(model_id, folder, alias=alias).revision

    def put(self, model_id: str, **facts: object) -> None:
        home = self.models / model_id
        home.mkdir(parents=True, exist_ok=True)
        shutil.copytree(self._tiny, home, dirs_exist_ok=True)
        (home / "rookery.json").write_text(json.dumps({"created_at": 1_600_000_000, **facts}))

    def take(self, model_id: str) -> None:
        shutil.rmtree(self.models / model_id)

    def truth(self) -> list[ModelInfo]:
        """By the folders alone."""
        homes = [home for space in self.models.iterdir() if space.name[0] != "." for home in space.iterdir()]
        ids = {f"{home.parent.name}/{home.name}".removeprefix("_/") for home in homes} | self.embedded.keys()
        found = {}
        for model_id in ids:
            with contextlib.suppress(ModelNotFound):
                info = self.stores[0].get_model(model_id)
                found[info.model_id] = info
        return [found[model_id] for model_id in sorted(found)]

    def check(self, **wanted: Unpack[Wanted]) -> None:
        """Both stores list the truth, in both orders."""
        truth = [info for info in self.truth() if _is_wanted(info, **wanted)]
        for store in self.stores:
            listed = _listed(store, **wanted)
            assert [(i.model_id, i.revision) for i in listed] == [(i.model_id, i.revision) for i in truth]
            assert listed == truth
            newest = sorted(truth, key=lambda info: (info.created_at, info.model_id), reverse=True)
            assert _listed(store, newest_first=True, **wanted) == newest


class Wanted(TypedDict, total=False):
    """What a catalogue can be asked for, besides a place in it."""

    query: str
    owner: str | None
    tags: tuple[str, ...]
    with_private: bool


def _is_wanted(
    info: ModelInfo,
    query: str = "",
    owner: str | None = None,
    tags: tuple[str, ...] = (),
    with_private: bool = True,
) -> bool:
    return (
        query.lower() in info.model_id.lower()
        and (owner is None or info.model_id.lower().startswith(f"{owner.lower()}/"))
        and all(tag in info.tags for tag in tags)
        and (with_private or not info.is_private)
    )


def _listed(
    store: Store,
    *,
    newest_first: bool = False,
    after: str | None = None,
    older_than: tuple[int, str] | None = None,
    **wanted: Unpack[Wanted],
) -> list[ModelInfo]:
    page = store.list_models(limit=EVERYTHING, newest_first=newest_first, after=after, older_than=older_than, **wanted)
    return list(page.items)


def _ids(
    store: Store,
    *,
    newest_first: bool = False,
    after: str | None = None,
    older_than: tuple[int, str] | None = None,
    **wanted: Unpack[Wanted],
) -> list[str]:
    listed = _listed(store, newest_first=newest_first, after=after, older_than=older_than, **wanted)
    return [info.model_id for info in listed]


@pytest.fixture
def disk(tmp_path: Path, tiny: Path) -> Disk:
    return Disk(tmp_path, tiny)


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
            facts: dict[str, object] = {"tags": ["t"]} if chance.random() < 0.5 else {}
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
            disk.stores[chance.randrange(2)].set_private(name, chance.random() < 0.5)

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
    disk.check(with_private=False)
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
        disk.stores[0].set_private("a/x", True)
        disk.stores[0].delete_model("a/y")
        disk.publish("a/new", number=5)
        disk.publish("a/hidden", number=6)
        disk.publish("c/new", number=7)
    disk.check()
    disk.check(query="new")


@pytest.mark.usefixtures("by_index_alone")
def test_hand_put_folder_is_listed_as_its_files_are_now(disk: Disk) -> None:
    disk.put("a/dropped", handles=["one"])
    assert _listed(disk.stores[0], query="dropped")[0].handles == ("one",)
    disk.put("a/dropped", handles=["two"])
    for store in disk.stores:
        assert _listed(store, query="dropped")[0].handles == ("two",)


def test_what_was_listed_once_is_listed_again_without_opening_it(disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(5):
        disk.publish(f"a/x{number}", number=number)
    expected = _listed(disk.stores[1], owner="a")

    def opened(*args: object, **kwargs: object) -> ModelInfo:
        raise AssertionError("a model was opened")

    monkeypatch.setattr("serve.store.listing.describe", opened)
    assert _listed(disk.stores[1], owner="a") == expected


# --- Searching ------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("by_index_alone")
@pytest.mark.parametrize("few", [0, 3, 1000])
def test_search_finds_what_contains_the_query_in_any_case(
    disk: Disk, few: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(index_search, "_FEW", few)  # by trigrams, by a walk, and between
    for name in ("ab_c", "abxc", "ab-c", "ab.c", "ABC", "abcabc", "a1", "zz"):
        disk.publish(f"Tweets/{name}")
    disk.publish("other/tweets")
    disk.publish("lone_tweets")
    for query in (
        *("b_c", "B_C", "b%c", "b-c", "B.C", "abc", "ABCA", "a", "_", "%", "-", ".", "/", "*", "weets", "TWEETS"),
        *("s/a", "tweets/ab", "/ab", "r/tweets", "tweets/", "a/b/c", "x/", '"', '"abc', "'", "a b", "ab\0", "\0"),
        *("\ud800", "é", "\u212a", "AND", "NEAR(a b)", "b?c", "", "q" * 500),
    ):
        disk.check(query=query)


@pytest.mark.usefixtures("by_index_alone")
@pytest.mark.parametrize("few", [0, 1000])
def test_conditions_hold_together_in_both_orders_and_pages(
    disk: Disk, few: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(index_search, "_FEW", few)
    for number, name in enumerate(("a/ax", "A/bx", "a/cy", "b/ax", "b/by", "lone")):
        disk.publish(name, number=number // 2, tags=["t", f"n{number % 2}"])
        disk.stores[0].set_private(name, number % 3 == 0)
    for query, owner, tags, with_private in itertools.product(
        ("", "x", "ax", "/a", "fled"),
        (None, "a", "B", "nobody"),
        ((), ("t",), ("n1", "t"), ("nothing",)),
        (True, False),
    ):
        wanted = Wanted(query=query, owner=owner, tags=tags, with_private=with_private)
        disk.check(**wanted)
        for newest_first in (False, True):
            whole = _listed(disk.stores[0], newest_first=newest_first, **wanted)
            assert list(_pages(disk.stores[1], 2, newest_first=newest_first, **wanted)) == whole


def _pages(store: Store, limit: int, *, newest_first: bool = False, **wanted: Unpack[Wanted]) -> Iterator[ModelInfo]:
    after, older_than = None, None
    while True:
        page = store.list_models(limit=limit, after=after, older_than=older_than, newest_first=newest_first, **wanted)
        assert len(page.items) == limit or not page.has_more
        yield from page.items
        if not page.has_more:
            return
        last = page.items[-1]
        after, older_than = (None, (last.created_at, last.model_id)) if newest_first else (last.model_id, None)


# --- Paging while the catalogue changes -----------------------------------------------------------------------


@pytest.mark.usefixtures("by_index_alone")
@pytest.mark.parametrize("newest_first", [False, True])
def test_paging_is_complete_and_without_doubles_while_models_come_and_go(disk: Disk, newest_first: bool) -> None:
    staying = {f"a/x{number:02}" for number in range(30)}
    for number, name in enumerate(sorted(staying)):
        disk.publish(name, number=number // 3)
    done, failures = threading.Event(), list[BaseException]()

    def come_and_go() -> None:
        try:
            for number in itertools.count():
                if done.is_set():
                    return
                disk.publish(f"a/x{number % 30:02}_", number=number % 10, by=1)
                disk.stores[1].delete_model(f"a/x{number % 30:02}_")
        except BaseException as exc:
            failures.append(exc)

    other = threading.Thread(target=come_and_go)
    other.start()
    try:
        for _ in range(15):
            met = [info.model_id for info in _pages(disk.stores[0], 3, newest_first=newest_first)]
            assert staying <= set(met)
            assert all(met.count(name) == 1 for name in staying)
    finally:
        done.set()
        other.join()
    assert not failures


@pytest.mark.usefixtures("by_index_alone")
def test_paging_by_age_goes_on_after_a_model_that_is_gone(disk: Disk) -> None:
    for number in range(6):
        disk.publish(f"a/x{number}", number=number)
    store = disk.stores[0]
    first = store.list_models(limit=2, newest_first=True, owner="a")
    assert [info.model_id for info in first.items] == ["a/x5", "a/x4"]
    store.delete_model("a/x4")
    last = first.items[-1]
    rest = _ids(disk.stores[1], newest_first=True, owner="a", older_than=(last.created_at, last.model_id))
    assert rest == ["a/x3", "a/x2", "a/x1", "a/x0"]
    everything = _ids(store, newest_first=True)
    assert _ids(store, newest_first=True, older_than=(1 << 99, "")) == everything
    assert _ids(store, newest_first=True, older_than=(-(1 << 99), "")) == []
    for said in ("\ud800", "nobody/" * 50):
        _ids(store, after=said), _ids(store, newest_first=True, older_than=(5, said))


# --- The file -------------------------------------------------------------------------------------------------


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
        _ids(store), _ids(store, newest_first=True), _ids(store, query="x1"), _ids(store, tags=("t",))
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
        assert [info.model_id for info in _pages(disk.stores[0], 2, owner="a")] == [f"a/x{n}" for n in range(5)]


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
        met = _ids(disk.stores[0])
        assert met == sorted(set(met))
    assert [publisher.returncode for publisher in publishers] == [0, 0]
    assert len(_ids(disk.stores[0])) == 1 + 2 * 90
    disk.check()
    with contextlib.closing(sqlite3.connect(disk.models / INDEX)) as db:
        assert db.execute("PRAGMA integrity_check").fetchall() == [("ok",)]


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
        assert _ids(store, owner="a", with_private=False) == ["a/Ada"]
        assert _ids(store, newest_first=True, tags=("t",)) == ["a/Ada"]
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
        found = [info.model_id for info in _pages(second, 2, newest_first=True, tags=("t",))]
        assert found == [f"a/x{number}" for number in reversed(range(9))]
        assert _ids(second, owner="a") == found[::-1]


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
    assert _ids(store, owner="a") == []
    with monkeypatch.context() as crashing:
        crashing.setattr(Index, "following", lambda *args: contextlib.nullcontext())
        disk.publish("a/x23")
    assert any(_ids(store, owner="a") == ["a/x23"] for _ in range(3))


# --- What is odd ----------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("by_index_alone")
def test_entry_that_cannot_be_followed_hides_no_other(disk: Disk) -> None:
    disk.publish("a/x")
    for link in ("loop", "a/loop"):
        (disk.models / link).symlink_to("loop")
    (disk.models / "dangling").symlink_to("nowhere")
    for store in disk.stores:
        assert _ids(store, owner="a") == ["a/x"]
        for absent in ("a/absent", "loop/absent", "a/loop"):
            with pytest.raises(ModelNotFound):
                store.resolve(absent)


@pytest.mark.skipif(os.geteuid() == 0, reason="who may do everything notices nothing")
def test_namespace_that_is_not_ours_to_read_is_empty(disk: Disk) -> None:
    disk.publish("a/x")
    (disk.models / "b").mkdir(mode=0)
    assert _ids(disk.stores[0]) == ["a/x", "base/fledgling"]


@pytest.mark.usefixtures("by_index_alone")
def test_strange_question_costs_nobody_the_index(disk: Disk) -> None:
    disk.publish("a/x", tags=["t"])
    disk.check()
    before = (disk.models / INDEX).stat().st_ino
    for tags in (tuple(f"t{number}" for number in range(3000)), ("t",) * 3000, ("t", "\ud800", "\0")):
        for newest_first in (False, True):
            expected = ["a/x"] if set(tags) == {"t"} else []
            assert _ids(disk.stores[0], tags=tags, newest_first=newest_first) == expected
    assert _ids(disk.stores[0], query="x" * 100_000) == []
    with pytest.raises(IndexUnavailable), Index(disk.models, disk.models / ".lock").writing() as db:
        db.execute("SELECT 1 FROM")
    assert (disk.models / INDEX).stat().st_ino == before


# --- Spellings ------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("by_index_alone")
def test_other_spellings_and_absences_are_looked_up_without_looking_at_all_homes(disk: Disk) -> None:
    disk.publish("a/Ada")
    disk.put("A/bob")
    first, second = disk.stores
    assert first.resolve("A/ADA").model_id == second.resolve("a/ada").model_id == "a/Ada"
    assert first.resolve("a/BOB").model_id == "A/bob"
    with pytest.raises(ModelNotFound):
        first.resolve("a/eve")
    disk.put("a/Eve")
    assert first.resolve("A/eve").model_id == second.resolve("A/eve").model_id == "a/Eve"
    disk.take("a/Eve")
    with pytest.raises(ModelNotFound):
        second.resolve("A/eve")
    shutil.rmtree(disk.models / "a")
    with pytest.raises(ModelNotFound):
        second.resolve("A/ada")
    disk.check()


@pytest.mark.usefixtures("by_index_alone")
def test_exact_id_never_touches_the_index(disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    disk.publish("a/Ada")

    def touched(*args: object) -> None:
        raise AssertionError("the index was asked")

    monkeypatch.setattr(Index, "_reading", touched)
    monkeypatch.setattr(Index, "writing", touched)
    assert disk.stores[0].resolve("a/Ada").model_id == disk.stores[0].get_model("a/Ada").model_id
    assert disk.stores[0].resolve("base/Fledgling").model_id == "base/fledgling"


def test_threads_that_write_and_read_while_the_index_vanishes_do_not_wait_for_each_other(disk: Disk) -> None:
    disk.publish("a/x")
    store, failures = disk.stores[0], list[BaseException]()

    def use(number: int) -> None:
        try:
            for _ in range(20):
                (disk.models / INDEX).unlink(missing_ok=True)
                store.set_private("A/X", number % 2 == 0)  # holds the lock, and looks into the index
                assert _ids(store, owner="a") == ["a/x"]
        except BaseException as exc:
            failures.append(exc)

    threads = [threading.Thread(target=use, args=(number,), daemon=True) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not failures and not any(thread.is_alive() for thread in threads)
