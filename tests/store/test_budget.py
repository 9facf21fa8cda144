"""Room for what comes from a Hub: the least recently used goes, never what is in use or kept, and nothing in vain."""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path

import pytest

from serve.errors import DiskFull
from serve.store.budget import IN_USE_S, RESERVE_BYTES, TOUCH_EVERY_S, DiskBudget, Reason
from serve.store.model_files import PROVENANCE
from serve.store.revisions import Revision, Store
from tests.fakes.models import write_tiny_gpt2

WEIGHTS = "model.safetensors"


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "data", embedded={})


def publish(store: Store, name: str, *, idle_s: float = 0.0, source: str = "hub", seed: int = 0) -> Revision:
    """As if it had been fetched, and not used since."""
    staged = write_tiny_gpt2(store.stage(), seed=seed)
    (staged / PROVENANCE).write_text(json.dumps({"source": source}))
    found = store.publish(name, staged)
    weights = found.path / WEIGHTS
    os.utime(weights, ns=(int((time.time() - idle_s) * 1e9), weights.stat().st_mtime_ns))
    return found


def budget(
    store: Store, limit_bytes: int = 0, free_bytes: int = 1 << 40, evicted: list[Reason] | None = None
) -> DiskBudget:
    """Of a disk that has so much room beside what is fetched now."""
    full = sum(one.num_bytes for one in store.fetched())

    def free(_: Path) -> int:
        return free_bytes + full - sum(one.num_bytes for one in store.fetched())

    return DiskBudget(
        store, limit_bytes, free_bytes=free, on_evict=(evicted if evicted is not None else list[Reason]()).append
    )


def make_room(room: DiskBudget, store: Store, num_bytes: int) -> None:
    room.make_room("a/new", num_bytes, working_bytes=2 * num_bytes, folder=store.stage())


def ids(store: Store) -> set[str]:
    return {info.model_id for info in store.list_models(limit=100).items}


@pytest.fixture
def size(store: Store) -> int:
    """Of one of the tiny models."""
    found = publish(store, "a/size")
    store.delete_model("a/size")
    assert not found.path.exists()
    staged = write_tiny_gpt2(store.stage())
    return sum(path.stat().st_size for path in staged.iterdir()) + len('{"source": "hub"}')


def test_least_recently_used_goes_when_the_budget_is_full_and_only_as_much_as_must(store: Store, size: int) -> None:
    for name, idle_s in (("a/old", 5000), ("a/older", 6000), ("a/oldest", 7000), ("a/young", 1000)):
        publish(store, name, idle_s=idle_s)
    evicted: list[Reason] = []
    make_room(budget(store, 4 * size, evicted=evicted), store, 2 * size)
    assert ids(store) == {"a/old", "a/young"} and evicted == ["budget"] * 2
    make_room(budget(store, 4 * size, evicted=evicted), store, 2 * size)
    assert ids(store) == {"a/old", "a/young"}


def test_full_disk_makes_room_without_any_budget(store: Store, size: int) -> None:
    publish(store, "a/old", idle_s=5000)
    publish(store, "a/older", idle_s=6000)
    evicted: list[Reason] = []
    make_room(budget(store, free_bytes=RESERVE_BYTES + size, evicted=evicted), store, size)
    assert ids(store) == {"a/old"} and evicted == ["space"]


def test_what_is_ours_kept_or_in_use_never_goes(store: Store, size: int) -> None:
    publish(store, "a/trained", idle_s=9000, source="training")
    publish(store, "a/kept", idle_s=9000)
    store.keep("a/kept")
    publish(store, "a/used", idle_s=IN_USE_S - 10)
    publish(store, "a/idle", idle_s=IN_USE_S + 10)
    make_room(budget(store, 2 * size), store, size)
    assert ids(store) == {"a/trained", "a/kept", "a/used"}
    with pytest.raises(DiskFull, match="ROOKERY_HUB_BYTES"):
        make_room(budget(store, 2 * size), store, 2 * size)


def test_nothing_goes_when_all_of_it_would_not_do(store: Store, size: int) -> None:
    publish(store, "a/old", idle_s=5000)
    with pytest.raises(DiskFull, match="'a/new' needs") as limit:
        make_room(budget(store, 4 * size), store, 5 * size)
    assert limit.value.retry_after_s is not None
    with pytest.raises(DiskFull, match="more than can be freed"):
        make_room(budget(store, free_bytes=0), store, 5 * size)
    assert ids(store) == {"a/old"}


def test_what_can_be_missed_goes_before_any_model(store: Store, size: int) -> None:
    publish(store, "a/old", idle_s=5000)
    free = [0]
    room = DiskBudget(store, free_bytes=lambda _: free[0], free_more=lambda: free.append(free.pop() + (1 << 30)))
    make_room(room, store, size)
    assert ids(store) == {"a/old"}


def test_use_is_remembered_at_most_once_a_minute_and_changes_nothing_else(store: Store, size: int) -> None:
    now = time.time()
    old, older = publish(store, "a/old", idle_s=5000), publish(store, "a/older", idle_s=6000)
    weights, before = older.path / WEIGHTS, (older.path / WEIGHTS).stat()
    room = DiskBudget(store, clock=lambda: now)
    room.touch(older)
    assert abs(weights.stat().st_atime - now) < 0.01
    assert (weights.stat().st_mtime_ns, weights.stat().st_mode) == (before.st_mtime_ns, before.st_mode)
    os.utime(weights, ns=(0, before.st_mtime_ns))
    now += TOUCH_EVERY_S - 1
    room.touch(older)
    assert weights.stat().st_atime == 0
    now += 2
    room.touch(older)
    assert abs(weights.stat().st_atime - now) < 0.01
    make_room(budget(store, 2 * size), store, size)
    assert ids(store) == {"a/older"} and not old.path.exists()
    room.touch(old)  # it is gone: nothing to do


def test_one_of_several_revisions_goes_with_the_aliases_that_name_it(store: Store, size: int) -> None:
    first, second = publish(store, "a/b", idle_s=5000), publish(store, "a/b", idle_s=4000, seed=1)
    store.set_alias(first, "v1")
    make_room(budget(store, 2 * size + 100), store, size)
    assert [one.revision for one in store.list_revisions("a/b")] == [second.revision]
    assert store.list_aliases("a/b") == {"main": second.revision}


def test_what_is_used_or_kept_while_room_is_made_stays_and_is_not_counted(store: Store, size: int) -> None:
    for number, name in enumerate(("a/first", "a/used", "a/kept")):
        publish(store, name, idle_s=9000 - number)
    evicted: list[Reason] = []

    def use_others(reason: Reason) -> None:
        evicted.append(reason)
        DiskBudget(store).touch(store.resolve("a/used"))
        store.keep("a/kept")

    with pytest.raises(DiskFull):
        make_room(DiskBudget(store, 3 * size, on_evict=use_others), store, 3 * size)
    assert ids(store) == {"a/used", "a/kept"} and evicted == ["budget"]


def test_what_was_removed_by_hand_does_not_count(store: Store, size: int) -> None:
    publish(store, "a/here", idle_s=5000)
    whole, part = publish(store, "a/whole", idle_s=9000), publish(store, "a/part", idle_s=9000)
    assert store.fetched_bytes() == 3 * size
    shutil.rmtree(whole.path.parent)
    shutil.rmtree(part.path)
    (part.path.parent / "main").unlink()
    make_room(DiskBudget(store, 2 * size), store, size)
    assert ids(store) == {"a/here"} and store.fetched_bytes() == size


def test_nothing_is_listed_where_there_is_room(store: Store, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    publish(store, "a/here", idle_s=5000)

    def listed(*args: object) -> None:
        raise AssertionError("all revisions were listed")

    monkeypatch.setattr(Store, "fetched", listed)
    make_room(DiskBudget(store, 2 * size, free_bytes=lambda _: 1 << 40), store, size)
    monkeypatch.setattr(Store, "fetched_bytes", listed)
    make_room(DiskBudget(store, free_bytes=lambda _: 1 << 40), store, size)


def test_what_fetches_have_left_counts_and_goes_first(store: Store, size: int) -> None:
    publish(store, "a/here", idle_s=5000)
    left = [2 * size]
    room = DiskBudget(store, 3 * size, other_bytes=lambda: sum(left), free_more=left.clear)
    make_room(room, store, size)
    assert ids(store) == {"a/here"} and left == []
    left.append(2 * size)
    make_room(DiskBudget(store, 3 * size, other_bytes=lambda: sum(left)), store, size)
    assert ids(store) == set()


def test_folder_put_there_by_hand_is_not_touched(store: Store, tmp_path: Path) -> None:
    weights = write_tiny_gpt2(tmp_path / "data/models/a/put") / WEIGHTS
    os.utime(weights, ns=(5, 6))
    DiskBudget(store).touch(store.resolve("a/put"))
    assert (weights.stat().st_atime_ns, weights.stat().st_mtime_ns) == (5, 6)
