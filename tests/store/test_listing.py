"""What the catalogue lists and finds: searches, pages, other spellings, and odd entries."""

from __future__ import annotations

import itertools
import os
import shutil
import threading
from pathlib import Path

import pytest

from serve.errors import ModelNotFound
from serve.store import index_search
from serve.store.disk import locked
from serve.store.index import INDEX, Index, IndexUnavailable
from serve.store.revisions import Store
from serve.types import ALL_SEEING, EVERYBODY, Viewer, Visibility
from tests.store.disk_world import Disk, Wanted, list_all, list_by_pages, list_ids

# --- Searching ------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("by_index_alone")
@pytest.mark.parametrize("few", [0, pytest.param(3, marks=pytest.mark.slow), 1000])
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
        disk.publish(name, number=number // 2, tags=["t", f"n{number % 2}"], tenant="ab"[number % 2])
        disk.stores[0].set_visibility(name, list(Visibility)[number % 3])
    for query, owner, tags, viewer in itertools.product(
        ("", "x", "ax", "/a", "fled"),
        (None, "a", "B", "nobody"),
        ((), ("t",), ("n1", "t"), ("nothing",)),
        (ALL_SEEING, EVERYBODY, Viewer("a"), Viewer("b")),
    ):
        wanted = Wanted(query=query, owner=owner, tags=tags, viewer=viewer)
        disk.check(**wanted)
        for newest_first in (False, True):
            whole = list_all(disk.stores[0], newest_first=newest_first, **wanted)
            assert list(list_by_pages(disk.stores[1], 2, newest_first=newest_first, **wanted)) == whole


@pytest.mark.usefixtures("by_index_alone")
def test_models_are_counted_as_they_are_listed(disk: Disk) -> None:
    def check() -> None:
        for store in disk.stores:
            for viewer in (ALL_SEEING, EVERYBODY, Viewer("a"), Viewer("b")):
                assert store.count_models(viewer=viewer) == len(list_all(store, viewer=viewer))

    check()
    for name in ("a/ada", "b/bob", "lone"):
        disk.publish(name)
    disk.put("base/Fledgling")  # which nobody sees: the program has its own
    disk.publish("a/unfinished", checkpoint_step=3)
    disk.put("a/by_hand")
    check()
    disk.stores[0].set_visibility("b/bob", Visibility.PRIVATE)
    check()
    disk.publish("b/own", tenant="b")
    disk.stores[0].set_visibility("b/own", Visibility.UNLISTED)
    check()
    disk.stores[0].delete_model("b/own")
    assert disk.stores[1].count_models() == 5 and disk.stores[1].count_models(viewer=EVERYBODY) == 4
    disk.stores[0].delete_model("a/ada")
    disk.take("a/by_hand")
    check()


@pytest.mark.usefixtures("by_index_alone")
def test_a_tenants_bytes_are_those_that_lie_there_whoever_published_or_deleted(disk: Disk, tmp_path: Path) -> None:
    machines = disk.stores = [
        Store(tmp_path / "data", embedded=disk.embedded, cache=tmp_path / f"cache-{name}") for name in "ab"
    ]

    def sizes() -> list[int]:
        return [machine.bytes_of("ada") for machine in machines]

    assert sizes() == [0, 0]
    disk.publish("a/first", tenant="ada", checkpoint_step=3)  # as a job that goes on has it: nothing is served yet
    assert sizes() == [0, 0]
    disk.publish("a/first", tenant="ada")
    disk.publish("b/of_another", tenant="bob")
    one = machines[0].get_model("a/first").num_bytes
    assert one > 0 and sizes() == [one, one]
    disk.publish("a/second", tenant="ada", by=1)
    assert sizes() == [2 * one, 2 * one]
    with locked(disk.models / ".lock"), locked(tmp_path / "cache-b/.lock"):  # nobody waits for who is writing
        (disk.models / "a/first" / machines[0].get_model("a/first").revision / "more.txt").write_text("x" * 1000)
        os.utime(disk.models / "a/first")
        grown = machines[0].get_model("a/first").num_bytes
        assert grown == one + 1000 and machines[1].bytes_of("ada") == one + grown
    machines[0].delete_model("a/second")
    assert sizes() == [grown, grown]


def test_where_there_can_be_no_index_models_are_not_counted(disk: Disk) -> None:
    (disk.models / INDEX).mkdir()
    assert disk.stores[0].count_models() is None


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
            met = [info.model_id for info in list_by_pages(disk.stores[0], 3, newest_first=newest_first)]
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
    rest = list_ids(disk.stores[1], newest_first=True, owner="a", older_than=(last.created_at, last.model_id))
    assert rest == ["a/x3", "a/x2", "a/x1", "a/x0"]
    everything = list_ids(store, newest_first=True)
    assert list_ids(store, newest_first=True, older_than=(1 << 99, "")) == everything
    assert list_ids(store, newest_first=True, older_than=(-(1 << 99), "")) == []
    for said in ("\ud800", "nobody/" * 50):
        list_ids(store, after=said), list_ids(store, newest_first=True, older_than=(5, said))


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


# --- What is odd ----------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("by_index_alone")
def test_entry_that_cannot_be_followed_hides_no_other(disk: Disk) -> None:
    disk.publish("a/x")
    for link in ("loop", "a/loop"):
        (disk.models / link).symlink_to("loop")
    (disk.models / "dangling").symlink_to("nowhere")
    for store in disk.stores:
        assert list_ids(store, owner="a") == ["a/x"]
        for absent in ("a/absent", "loop/absent", "a/loop"):
            with pytest.raises(ModelNotFound):
                store.resolve(absent)


@pytest.mark.skipif(os.geteuid() == 0, reason="who may do everything notices nothing")
def test_namespace_that_is_not_ours_to_read_is_empty(disk: Disk) -> None:
    disk.publish("a/x")
    (disk.models / "b").mkdir(mode=0)
    assert list_ids(disk.stores[0]) == ["a/x", "base/fledgling"]


@pytest.mark.usefixtures("by_index_alone")
def test_strange_question_costs_nobody_the_index(disk: Disk) -> None:
    disk.publish("a/x", tags=["t"])
    disk.check()
    before = (disk.models / INDEX).stat().st_ino
    for tags in (tuple(f"t{number}" for number in range(3000)), ("t",) * 3000, ("t", "\ud800", "\0")):
        for newest_first in (False, True):
            expected = ["a/x"] if set(tags) == {"t"} else []
            assert list_ids(disk.stores[0], tags=tags, newest_first=newest_first) == expected
    assert list_ids(disk.stores[0], query="x" * 100_000) == []
    with pytest.raises(IndexUnavailable), Index(disk.models, disk.models / ".lock").writing() as db:
        db.execute("SELECT 1 FROM")
    assert (disk.models / INDEX).stat().st_ino == before
