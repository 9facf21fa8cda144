"""Loads that hang, and loads for which there is no memory: whoever waits is told, and nothing is lost for ever."""

from __future__ import annotations

import asyncio
import os
import threading
from pathlib import Path

import pytest

from serve.errors import ModelUnusable, OutOfMemory, StoreUnavailable
from serve.pool.loader import Evicted, LoadFailed
from serve.pool.watchdog import MAX_HUNG, Hung, ThreadPerCall, Watchdog
from tests.pool.harness import MakeWorld


def test_a_load_that_hangs_gives_its_turn_to_the_next_and_its_bytes_when_it_ends(make_world: MakeWorld) -> None:
    world = make_world(budget_bytes=2, max_parallel_loads=1, limit_s=120.0)
    ada, bob = world.lease("ada"), world.lease("bob")
    world.finish("prepare ada", "prepare bob")
    assert world.calls == ["load ada"]
    world.advance(119.0)
    assert (ada.state, bob.state) == ("waiting", "waiting")
    world.advance(1.0)
    assert isinstance(ada.error, StoreUnavailable) and ada.error.retry_after_s
    assert world.calls == ["load ada", "load bob"]
    world.finish("load bob")
    assert bob.state == "holding"
    bob.release()
    assert world.pool.used_bytes == 2, "a thread may still write there"
    world.finish("load ada", "unload ada")
    assert world.pool.used_bytes == 1
    assert world.events[-1] == Evicted("ada", 1, "late", 0.0)
    again = world.lease("ada")
    world.finish("prepare ada", "load ada")
    assert again.state == "holding"
    again.release()


def test_while_a_model_hangs_it_is_refused_at_once_and_others_are_not(make_world: MakeWorld) -> None:
    world = make_world(max_parallel_prepares=1, limit_s=120.0)
    ada = world.lease("ada")
    world.advance(120.0)
    again = world.lease("ada")
    assert isinstance(ada.error, Hung) and isinstance(again.error, StoreUnavailable)
    assert world.calls == ["prepare ada"] and world.pool.used_bytes == 0
    bob = world.lease("bob")
    world.finish("prepare bob", "load bob")
    bob.release()
    world.finish("prepare ada")
    ada = world.lease("ada")
    world.finish("prepare ada", "load ada")
    ada.release()


def test_a_load_that_hung_and_fails_after_all_leaves_nothing(make_world: MakeWorld) -> None:
    world = make_world(limit_s=120.0)
    ada = world.lease("ada")
    world.finish("prepare ada")
    world.advance(120.0)
    assert ada.state == "refused" and world.pool.used_bytes == 1
    world.finish("load ada", error=OSError(5, "Input/output error"))
    assert repr(world.pool) == "<ModelPool [0 of 4 bytes]>"
    assert world.events == [LoadFailed("ada", "store_unavailable")]


def test_a_pool_closes_beside_a_load_that_hangs(make_world: MakeWorld) -> None:
    world = make_world(limit_s=120.0)
    world.lease("ada")
    world.finish("prepare ada")
    world.advance(120.0)
    world.threads.calls.clear()  # it never ends
    world.do(world.pool.close())


def test_a_load_without_memory_is_tried_again_when_all_that_is_idle_has_gone(make_world: MakeWorld) -> None:
    world = make_world(budget_bytes=4)
    world.bring("idle", "pinned")
    world.do(world.pool.pin("pinned"))
    used, ada = world.lease("used"), world.lease("ada")
    world.finish("prepare used", "load used", "prepare ada")
    world.finish("load ada", error=OutOfMemory("There is none."))
    assert world.calls == ["unload idle"] and ada.state == "waiting"
    world.finish("unload idle", "load ada")
    assert ada.state == "holding"
    assert [model.key for model in world.pool.residents()] == ["pinned", "used", "ada"]
    assert [event for event in world.events if isinstance(event, Evicted)] == [Evicted("idle", 1, "memory", 2.0)]
    for borrower in (used, ada):
        borrower.release()


def test_a_load_without_memory_even_then_is_refused_and_can_be_asked_for_again(make_world: MakeWorld) -> None:
    world = make_world()
    ada = world.lease("ada")
    world.finish("prepare ada")
    for _ in range(2):
        world.finish("load ada", error=OutOfMemory("There is none.", retry_after_s=5))
    assert isinstance(ada.error, OutOfMemory) and ada.error.retry_after_s == 5
    assert world.pool.used_bytes == 0
    again = world.lease("ada")
    world.finish("prepare ada", "load ada")
    again.release()


def test_a_refused_model_goes_with_its_last_lease_and_comes_back_in_time(make_world: MakeWorld) -> None:
    world = make_world()
    world.bring("ada")
    holder = world.lease("ada")
    world.pool.refuse("ada", ModelUnusable("It writes nonsense."), 900.0)
    world.settle()
    assert holder.state == "holding" and isinstance(world.lease("ada").error, ModelUnusable)
    holder.release()
    world.finish("unload ada")
    world.advance(899.0)
    assert isinstance(world.lease("ada").error, ModelUnusable)
    world.advance(1.0)
    again = world.lease("ada")
    world.finish("prepare ada", "load ada")
    again.release()


async def test_a_read_that_nobody_answers_is_let_go_of_and_its_end_is_told(tmp_path: Path) -> None:
    path = tmp_path / "pipe"
    os.mkfifo(path)  # to open it waits for somebody who writes, for ever
    watchdog = Watchdog(ThreadPerCall(), 0.05)
    late: list[bytes | None] = []
    with pytest.raises(Hung):
        await watchdog.call("ada", path.read_bytes, when_late=late.append)
    with pytest.raises(StoreUnavailable):
        watchdog.check("ada")
    watchdog.check("bob")
    await asyncio.to_thread(path.write_bytes, b"after all")
    async with asyncio.timeout(10):
        while not late:
            await asyncio.sleep(0.01)
    assert late == [b"after all"]
    watchdog.check("ada")


async def test_so_many_may_hang_and_no_more() -> None:
    gate, watchdog = threading.Event(), Watchdog(ThreadPerCall(), 0.01)
    calls = [watchdog.call(str(number), gate.wait) for number in range(MAX_HUNG)]
    assert {type(error) for error in await asyncio.gather(*calls, return_exceptions=True)} == {Hung}
    with pytest.raises(StoreUnavailable):
        watchdog.check("another")
    gate.set()
    async with asyncio.timeout(10):
        while watchdog.num_hung:
            await asyncio.sleep(0.01)
    watchdog.check("another")
