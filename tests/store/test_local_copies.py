"""Copies of weights on a machine's own disk: made once, used while the original is there, gone with it."""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from serve.store.disk import is_shared
from serve.store.local_copies import LocalCopies
from serve.store.model_files import PROVENANCE
from serve.store.revisions import Revision, Store
from serve.store.validate import WEIGHTS
from serve.types import EVERYBODY, Visibility
from tests.fakes.logs import captured_lines
from tests.fakes.models import write_tiny_gpt2

NOW = 1_800_000_000.0
IN_USE_S = 100.0  # of the copies


class World:
    """A store in a folder that machines share, and the copies of one of them."""

    def __init__(self, tmp_path: Path) -> None:
        self.tmp_path = tmp_path
        self.store = Store(tmp_path / "data", embedded={})
        self.root = tmp_path / "cache/weights"
        self.now = NOW
        self.num_evicted = 0

    def publish(self, model_id: str, seed: int = 0) -> Revision:
        staged = self.store.stage()
        write_tiny_gpt2(staged, seed=seed)
        return self.store.publish(model_id, staged)

    def copies(self, limit_bytes: int = 0, *, free_bytes: Callable[[Path], int] = lambda path: 2**40) -> LocalCopies:
        def count() -> None:
            self.num_evicted += 1

        return LocalCopies(
            self.root,
            self.store.models,
            limit_bytes,
            in_use_s=IN_USE_S,
            free_bytes=free_bytes,
            clock=lambda: self.now,
            on_evict=count,
        )

    def files(self) -> list[str]:
        """All that the machine keeps."""
        return sorted(str(path.relative_to(self.root)) for path in self.root.rglob("*") if path.is_file())


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def test_a_copy_is_made_once_and_has_the_bytes_of_its_original(world: World) -> None:
    weights = world.publish("org/ada").path / WEIGHTS
    copies = world.copies()
    assert copies.find(weights) is None
    with captured_lines() as lines:
        copy = copies.make(weights)
        assert copy is not None and copies.make(weights) == copies.find(weights) == copy
    assert [line["event"] for line in lines] == ["weights_copied"]
    assert copy.read_bytes() == weights.read_bytes()
    assert copy.stat().st_mode & 0o777 == 0o444, "nobody may change what others have mapped"
    assert world.files() == [str(weights.relative_to(world.store.models))]


def test_a_copy_whose_revision_is_gone_is_neither_used_nor_kept(world: World) -> None:
    ada, bob = world.publish("org/ada", 1).path / WEIGHTS, world.publish("bob", 2).path / WEIGHTS
    copies = world.copies()
    assert copies.make(ada) and copies.make(bob)
    world.store.delete_model("org/ada")
    with pytest.raises(FileNotFoundError):
        copies.find(ada)
    copies.sweep()
    assert world.files() == [str(bob.relative_to(world.store.models))]
    assert not (world.root / "org").exists()


@pytest.mark.parametrize("spelled", ["org/Ada", "ORG/ADA", "org/ada"])
def test_a_forgotten_model_has_no_copies_however_it_is_spelled(world: World, spelled: str) -> None:
    ada, other = world.publish("org/Ada", 1).path / WEIGHTS, world.publish("Ada", 2).path / WEIGHTS
    copies = world.copies()
    assert copies.make(ada) and copies.make(other)
    copies.forget(spelled)
    assert world.files() == [str(other.relative_to(world.store.models))]
    copies.forget("ADA")
    assert world.files() == []


def test_to_forget_one_model_nobody_looks_at_the_copies_of_others(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    copies = world.copies()
    for number, model_id in enumerate(("org/ada", "org/bob", "acme/ada")):
        assert copies.make(world.publish(model_id, number).path / WEIGHTS)
    really_scan, seen = os.scandir, set()

    def noted(path: str | Path) -> object:
        seen.add(str(Path(path).relative_to(world.root)))
        return really_scan(path)

    monkeypatch.setattr(os, "scandir", noted)
    copies.forget("org/ada")
    assert {path for path in seen if path.count("/") == 1} == {"org/ada"} and "acme" not in seen


@pytest.mark.parametrize("act", [LocalCopies.sweep, lambda copies: copies.forget("org/ada")])
def test_a_folder_that_another_process_removes_meanwhile_stops_nobody(
    world: World, monkeypatch: pytest.MonkeyPatch, act: Callable[[LocalCopies], None]
) -> None:
    ada, bob = world.publish("org/ada", 1).path / WEIGHTS, world.publish("zoe", 2).path / WEIGHTS
    copies = world.copies()
    assert copies.make(ada) and copies.make(bob)
    world.store.delete_model("zoe")
    really_scan, removed = os.scandir, list[str | Path]()

    def late(path: str | Path) -> object:
        if not removed and Path(path).name == ada.parent.name:
            removed.append(path)
            shutil.rmtree(world.root / "org")
        return really_scan(path)

    monkeypatch.setattr(os, "scandir", late)
    act(copies)
    assert removed
    copies.sweep()
    assert world.files() == []


def test_while_the_shared_folder_is_not_mounted_no_copy_is_taken_for_abandoned(world: World) -> None:
    weights = world.publish("org/ada").path / WEIGHTS
    copies = world.copies()
    copy = copies.make(weights)
    world.store.models.rename(world.tmp_path / "elsewhere")
    copies.sweep()
    (world.tmp_path / "elsewhere").rename(world.store.models)
    assert copy is not None and copies.find(weights) == copy


def test_a_model_that_is_forgotten_while_it_is_copied_leaves_nothing(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = world.publish("org/ada").path / WEIGHTS
    copies = world.copies()

    def forgotten_meanwhile(folder: Path, digest: str) -> bool:
        copies.forget("org/ada")
        return True

    monkeypatch.setattr("serve.store.local_copies.is_intact", forgotten_meanwhile)
    with captured_lines() as lines:
        assert copies.make(weights) is None
    assert [(line["event"], line["reason"]) for line in lines] == [
        ("weights_not_copied", "The model was deleted meanwhile.")
    ]
    assert world.files() == []


def test_the_least_recently_used_go_first_and_none_that_is_in_use(world: World) -> None:
    weights = [world.publish(f"org/m{number}", number).path / WEIGHTS for number in range(4)]
    size = weights[0].stat().st_size
    copies = world.copies(2 * size)
    assert copies.make(weights[0])
    world.now += 1
    assert copies.make(weights[1])
    world.now += IN_USE_S
    assert copies.find(weights[0]), "used again: now the other one is the older"
    world.now += 2
    assert copies.make(weights[2])
    assert copies.find(weights[1]) is None and world.num_evicted == 1
    with captured_lines() as lines:
        assert copies.make(weights[3]) is None, "both that are there may be about to be loaded"
    assert [line["event"] for line in lines] == ["weights_not_copied"]
    assert copies.find(weights[0]) and copies.find(weights[2])


def test_on_a_disk_without_room_nothing_is_removed_in_vain_and_the_original_is_read(world: World) -> None:
    ada, bob = world.publish("org/ada", 1).path / WEIGHTS, world.publish("org/bob", 2).path / WEIGHTS
    assert world.copies().make(ada)
    world.now += 2 * IN_USE_S
    full = world.copies(free_bytes=lambda path: 0)
    with captured_lines() as lines:
        assert full.make(bob) is None
    assert [line["event"] for line in lines] == ["weights_not_copied"]
    assert full.find(ada) is not None


def test_what_arrives_damaged_is_no_copy(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    found = world.publish("org/ada")
    weights = found.path / WEIGHTS
    damaged = bytearray(weights.read_bytes())
    damaged[-1] ^= 1
    weights.chmod(0o644)
    weights.write_bytes(damaged)
    weights.chmod(0o444)
    with captured_lines() as lines:
        assert world.copies().make(weights) is None
    assert [line["reason"] for line in lines] == ["What was copied is not what was published."]
    assert world.files() == []


def test_a_revision_from_a_hub_is_copied_though_its_name_is_no_hash_of_its_files(world: World) -> None:
    staged = world.store.stage()
    write_tiny_gpt2(staged)
    (staged / PROVENANCE).write_text('{"source": "hub"}')
    found = world.store.publish("org/ada", staged, revision="a" * 40)
    assert world.copies().make(found.path / WEIGHTS)


def test_what_was_put_there_by_hand_or_comes_with_the_program_is_not_copied(world: World) -> None:
    by_hand = write_tiny_gpt2(world.store.models / "org/by-hand")
    elsewhere = write_tiny_gpt2(world.tmp_path / "elsewhere")
    for folder in (by_hand, elsewhere):
        (folder / WEIGHTS).chmod(0o444)
        assert world.copies().make(folder / WEIGHTS) is None
    assert world.files() == []


def test_many_that_want_one_copy_make_it_once(world: World) -> None:
    weights = world.publish("org/ada").path / WEIGHTS
    found: list[Path | None] = []
    with captured_lines() as lines:
        threads = [threading.Thread(target=lambda: found.append(world.copies().make(weights))) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(set(found)) == 1 and found[0] is not None
    assert [line["event"] for line in lines] == ["weights_copied"]


def test_what_a_process_left_half_made_is_begun_anew_and_swept(world: World) -> None:
    ada, bob = world.publish("org/ada", 1).path / WEIGHTS, world.publish("org/bob", 2).path / WEIGHTS
    for weights in (ada, bob):
        part = world.root / weights.relative_to(world.store.models).with_name(f"{WEIGHTS}.part")
        part.parent.mkdir(parents=True)
        part.write_bytes(b"half")
    copies = world.copies()
    copy = copies.make(ada)
    assert copy is not None and copy.read_bytes() == ada.read_bytes()
    copies.sweep()
    assert world.files() == [str(ada.relative_to(world.store.models))]


def test_a_shared_folder_that_does_not_answer_costs_no_copy(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = world.publish("org/ada").path / WEIGHTS
    copies = world.copies()
    copy = copies.make(weights)

    really_stat = Path.stat

    def silent(path: Path, **options: bool) -> os.stat_result:
        if path == weights:
            raise OSError(5, "Input/output error")
        return really_stat(path, **options)

    monkeypatch.setattr(Path, "stat", silent)
    copies.sweep()
    assert copy is not None and copy.exists()


def test_copies_that_cannot_be_forgotten_now_are_told_of_and_hinder_nobody(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(path: str | Path) -> object:
        raise OSError(5, "Input/output error")

    copies = world.copies()
    monkeypatch.setattr(os, "scandir", fail)
    with captured_lines() as lines:
        copies.forget("org/ada")
    assert [(line["event"], line["model"]) for line in lines] == [("copies_not_forgotten", "org/ada")]


def test_when_a_copy_was_used_is_told_by_its_access_time(world: World) -> None:
    weights = world.publish("org/ada").path / WEIGHTS
    copies = world.copies()
    copy = copies.make(weights)
    assert copy is not None
    world.now += 7
    copies.find(weights)
    assert copy.stat().st_atime == world.now
    assert copy.stat().st_mtime_ns == weights.stat().st_mtime_ns


@pytest.mark.parametrize(
    ("kind", "shared"),
    [
        *((kind, True) for kind in ("nfs4", "fuse.juicefs", "fuse.glusterfs", "fuse.ceph-fuse", "fuse.sshfs")),
        *((kind, False) for kind in ("xfs", "tmpfs", "fuseblk", "fuse.gocryptfs", "fuse.mergerfs")),
    ],
)
def test_the_kind_of_a_file_system_says_whether_machines_share_it(
    kind: str, shared: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, other = (
        "28 1 254:0 / / rw - ext4 /dev/vda rw",
        f"52 28 0:49 / /var/lib/a rw,relatime shared:7 - {kind} host:/x rw",
    )
    monkeypatch.setattr(Path, "read_text", lambda path, **options: f"{root}\n{other}\n")
    is_shared.cache_clear()
    try:
        assert is_shared(os.makedev(0, 49)) == shared
        assert not is_shared(os.makedev(254, 0))
        assert not is_shared(os.makedev(0, 4)), "nothing is known of it"
    finally:
        is_shared.cache_clear()


def test_two_machines_with_their_own_index_each_see_what_the_other_does(tmp_path: Path) -> None:
    data, nodes = tmp_path / "data", [tmp_path / "node-0", tmp_path / "node-1"]
    one, two = (Store(data, embedded={}, cache=cache) for cache in nodes)

    def listed(store: Store) -> list[str]:
        return [info.model_id for info in store.list_models(limit=10).items]

    def publish(store: Store, model_id: str) -> None:
        staged = store.stage()
        write_tiny_gpt2(staged)
        store.publish(model_id, staged)

    publish(one, "org/ada")
    assert listed(one) == listed(two) == ["org/ada"]
    publish(two, "org/bob")
    two.set_visibility("org/ada", Visibility.PRIVATE)
    assert listed(one) == listed(two) == ["org/ada", "org/bob"]
    assert [info.model_id for info in one.list_models(limit=10, viewer=EVERYBODY).items] == ["org/bob"]
    one.delete_model("org/ada")
    assert listed(one) == listed(two) == ["org/bob"]
    assert not list((data / "models").glob(".index*")), "no database lies in the shared folder"
    assert all(list(cache.glob(".index*")) for cache in nodes)


def test_what_is_new_is_told_by_the_clock_of_the_disk_not_of_this_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(tmp_path / "data", embedded={}, cache=tmp_path / "cache")
    real = time.time_ns
    monkeypatch.setattr("time.time_ns", lambda: real() + 3600 * 10**9)  # an hour ahead of the disk
    staged = store.stage()
    write_tiny_gpt2(staged)
    store.publish("org/ada", staged)
    assert len(store.list_models(limit=10).items) == 1
    before = os.stat(store.models / "org")
    write_tiny_gpt2(store.models / "org/bob")
    os.utime(store.models / "org", ns=(before.st_atime_ns, before.st_mtime_ns))  # within a tick of the disk's clock
    assert len(store.list_models(limit=10).items) == 2
