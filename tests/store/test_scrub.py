"""F27: bytes that a disk has changed are found within a round, and are not served."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from serve.errors import ModelUnusable
from serve.hub.fetch import Hub
from serve.locator import Locator
from serve.store.integrity import is_intact
from serve.store.lookup import Revision
from serve.store.revisions import Store
from serve.store.scrub import Scrub
from serve.store.validate import WEIGHTS
from tests.fakes.hub import fake_hub
from tests.fakes.models import write_tiny_gpt2

HOURS = 20.0
ADA = "huggingtweets/ada"


class Clock:
    """Seconds that pass when the test says so."""

    def __init__(self) -> None:
        self.now = 1_800_000_000.0

    def __call__(self) -> float:
        return self.now


def flip_bit(path: Path, at: int = -1000) -> None:
    """As a disk does: neither size, time nor mode changes."""
    status = path.stat()
    path.chmod(0o644)
    with path.open("r+b") as file:
        file.seek(at, os.SEEK_END)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))
    path.chmod(status.st_mode & 0o777)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


@pytest.fixture
def store(tmp_path: Path) -> Store:
    store = Store(tmp_path / "data", embedded={})
    for number in range(4):
        store.import_folder(write_tiny_gpt2(tmp_path / f"m{number}", seed=number), f"test/m{number}")
    return store


def one_round(scrub: Scrub, clock: Clock) -> None:
    until = clock.now + HOURS * 3600
    while clock.now < until:
        clock.now += scrub.step()


def scrub_of(store: Store, found: list[str], clock: Callable[[], float]) -> Scrub:
    return Scrub(store, HOURS, on_damaged=lambda one: found.append(one.model_id), clock=clock)


@pytest.mark.parametrize("name", [WEIGHTS, "config.json", "merges.txt"])
def test_f27_a_flipped_bit_of_any_file_is_found_within_a_round_and_the_revision_is_not_served(
    store: Store, name: str
) -> None:
    found, clock = list[str](), Clock()
    scrub = scrub_of(store, found, clock)
    one_round(scrub, clock)
    assert found == []

    flip_bit(store.resolve("test/m2").path / name, -3)
    one_round(scrub, clock)
    assert found == ["test/m2"]
    with pytest.raises(ModelUnusable, match="damaged"):
        store.resolve("test/m2")
    assert store.resolve("test/m1")
    one_round(scrub, clock)
    assert found == ["test/m2"], "it was told twice"


def test_a_round_is_spread_over_its_hours_and_goes_on_after_a_restart(store: Store) -> None:
    clock, found = Clock(), list[str]()
    looked: list[float] = []
    began = clock.now
    for _ in range(2):  # each a process of its own
        scrub = scrub_of(store, found, clock)
        while len(looked) < 2 or clock.now < began + 3600 * (HOURS - 0.1):
            wait_s = scrub.step()
            if wait_s == 0.0:
                looked.append((clock.now - began) / 3600)
            clock.now += wait_s
            if len(looked) == 2 and wait_s == 0.0:
                break
    assert looked == pytest.approx([0, 5, 10, 15], abs=0.1)


def test_a_clock_that_is_set_back_stops_no_round(store: Store) -> None:
    found, clock = list[str](), Clock()
    scrub = scrub_of(store, found, clock)
    one_round(scrub, clock)
    clock.now -= 1_000_000
    flip_bit(store.resolve("test/m3").path / WEIGHTS)
    one_round(scrub, clock)
    assert found == ["test/m3"]


def test_a_full_disk_stops_no_round_and_has_no_model_looked_at_twice(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked, found, clock = list[str](), list[str](), Clock()

    def note(path: Path) -> bool | None:
        looked.append(path.parent.name)
        return is_intact(path)

    monkeypatch.setattr("serve.store.scrub.is_intact", note)
    (store.models / ".scrub.json").mkdir()  # nothing can be written there
    scrub = scrub_of(store, found, clock)
    assert [scrub.step() > 0 for _ in range(3)] == [False, True, True] and looked == ["m0"]
    flip_bit(store.resolve("test/m3").path / WEIGHTS)
    one_round(scrub, clock)
    assert found == ["test/m3"] and looked == ["m0", "m1", "m2", "m3"]
    (store.models / ".scrub.json").rmdir()
    clock.now += HOURS * 3600
    scrub.step()
    assert (store.models / ".scrub.json").is_file(), "it was not written when there was room again"


def test_who_is_not_the_only_one_leaves_the_work_to_the_other(store: Store, tmp_path: Path) -> None:
    others = list[str]()
    clock = Clock()

    def while_the_first_looks(found: Revision) -> None:
        assert scrub_of(Store(tmp_path / "data", embedded={}), others, clock).step() > 0

    flip_bit(store.resolve("test/m0").path / WEIGHTS)
    Scrub(store, HOURS, on_damaged=while_the_first_looks, clock=clock).step()
    assert others == []


def test_the_same_model_published_again_is_served_again(store: Store, tmp_path: Path) -> None:
    clock = Clock()
    damaged = store.resolve("test/m0")
    flip_bit(damaged.path / WEIGHTS)
    one_round(scrub_of(store, [], clock), clock)
    again = store.import_folder(tmp_path / "m0", "test/m0")
    assert again == damaged == store.resolve("test/m0")
    good = write_tiny_gpt2(tmp_path / "good", seed=0) / WEIGHTS
    assert (again.path / WEIGHTS).read_bytes() == good.read_bytes()


async def test_f27_a_damaged_model_from_the_hub_is_fetched_again_and_stays_kept(tmp_path: Path) -> None:
    with fake_hub() as server:
        folder = write_tiny_gpt2(tmp_path / "ada")
        server.add(ADA, folder)
        store = Store(tmp_path / "data", embedded={})
        hub = Hub(store, endpoint=server.endpoint)
        hub.pull(ADA)
        locator, clock = Locator(store, hub), Clock()
        weights = store.resolve(ADA).path / WEIGHTS
        flip_bit(weights)
        one_round(scrub_of(store, [], clock), clock)
        revision, fetch_s = await locator.locate(ADA)
        locator.close()
        assert fetch_s > 0 and (revision.path / WEIGHTS).read_bytes() == (folder / WEIGHTS).read_bytes()
        assert (await_free := list(store.fetched())) == [], f"{await_free} may be removed, though it was kept"
        found = list[str]()
        one_round(scrub_of(store, found, clock), clock)
        assert found == []


async def test_a_damaged_model_that_was_made_here_says_so(store: Store) -> None:
    hub = Hub(store, enabled=False)
    locator, clock = Locator(store, hub), Clock()
    flip_bit((await locator.locate("test/m1"))[0].path / WEIGHTS)
    one_round(scrub_of(store, [], clock), clock)
    with pytest.raises(ModelUnusable, match="roll the model back"):
        await locator.locate("test/m1")
    locator.close()


def test_a_model_that_is_removed_while_it_is_looked_at_stops_nothing(store: Store) -> None:
    found, clock = list[str](), Clock()
    scrub = scrub_of(store, found, clock)
    scrub.step()
    shutil.rmtree(store.models / "test/m1")
    flip_bit(store.resolve("test/m2").path / WEIGHTS)
    one_round(scrub, clock)
    assert found == ["test/m2"]
