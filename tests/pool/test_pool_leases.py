"""Leases: one load for all who wait, and waiters that leave."""

from __future__ import annotations

import pytest

from serve.pool.loader import Evicted, Loaded
from tests.pool.harness import MakeWorld

# --- A lease --------------------------------------------------------------------------------------------------


def test_repr_tells_each_step_of_a_models_stay(make_world: MakeWorld) -> None:
    world = make_world(budget_bytes=4, sizes={"ada": 3})
    assert repr(world.pool) == "<ModelPool [0 of 4 bytes]>"

    # A first request starts to find out what the model is; nothing is reserved for it.
    ada = world.lease("ada")
    assert repr(world.pool) == "<ModelPool [0 of 4 bytes; 1 waiting; ada: preparing, 1 waiters]>"

    # Then it is known, and there is room: the bytes count from here on.
    world.finish("prepare ada")
    assert repr(world.pool) == "<ModelPool [3 of 4 bytes; 1 waiting; ada: loading, 3 bytes from disk, 1 waiters]>"

    # It is resident, and leased.
    world.advance(2.0)
    world.finish("load ada")
    assert repr(world.pool) == "<ModelPool [3 of 4 bytes; ada: resident, 3 bytes from disk, 1 leases]>"
    assert ada.lease is not None
    assert (ada.lease.key, ada.lease.tier, ada.lease.load_s) == ("ada", "disk", 2.0)

    # The lease ends; the model stays.
    ada.release()
    world.advance(5.0)
    assert repr(world.pool) == "<ModelPool [3 of 4 bytes; ada: resident, 3 bytes from disk, idle 5 s]>"

    # A second request finds it there.
    again = world.lease("ada")
    assert again.lease is not None
    assert (again.lease.tier, again.lease.load_s) == ("device", 0.0)
    again.release()

    # Another model needs the place: it is made only now that the other is known to exist.
    bob = world.lease("bob")
    eve = world.lease("eve")
    world.finish("prepare bob", "prepare eve")
    assert repr(world.pool) == (
        "<ModelPool [4 of 4 bytes; 2 waiting; ada: unloading, 3 bytes from disk, budget; "
        "bob: loading, 1 bytes from disk, 1 waiters; eve: waiting, 1 bytes from disk, 1 waiters]>"
    )

    # The bytes count until the unload has returned.
    world.finish("unload ada")
    assert repr(world.pool) == (
        "<ModelPool [2 of 4 bytes; 2 waiting; "
        "bob: loading, 1 bytes from disk, 1 waiters; eve: loading, 1 bytes from disk, 1 waiters]>"
    )
    world.finish("load bob", "load eve")
    bob.release()
    eve.release()
    assert world.events == [
        Loaded("ada", 3, "disk", 2.0),
        Evicted("ada", 3, "budget", age_s=5.0),
        Loaded("bob", 1, "disk", 0.0),
        Loaded("eve", 1, "disk", 0.0),
    ]


def test_a_warm_lease_never_waits_behind_a_cold_load(make_world: MakeWorld) -> None:
    world = make_world()
    world.bring("ada")
    cold = world.lease("bob")  # its load hangs

    async def lease_in_one_step() -> None:
        context = world.pool.lease("ada")
        with pytest.raises(StopIteration) as entered:  # a coroutine that ends at its first step has not waited
            context.__aenter__().__await__().__next__()
        assert entered.value.value.tier == "device"
        await context.__aexit__(None, None, None)

    world.do(lease_in_one_step())
    world.finish("prepare bob", "load bob")
    cold.release()


def test_a_model_is_loaded_once_however_many_wait_for_it(make_world: MakeWorld) -> None:
    world = make_world()
    waiting = [world.lease("ada") for _ in range(20)]
    assert world.calls == ["prepare ada"]
    world.finish("prepare ada")
    assert world.calls == ["load ada"]
    world.finish("load ada")
    assert {borrower.state for borrower in waiting} == {"holding"}
    assert len({id(borrower.lease.slot) for borrower in waiting if borrower.lease}) == 1
    for borrower in waiting:
        borrower.release()


def test_different_models_load_side_by_side_as_many_as_allowed(make_world: MakeWorld) -> None:
    world = make_world(budget_bytes=9, max_parallel_loads=2, max_parallel_prepares=3)
    borrowers = [world.lease(key) for key in ("ada", "bob", "cyd", "dan")]
    assert world.calls == ["prepare ada", "prepare bob", "prepare cyd"]
    world.finish("prepare bob")
    assert world.calls == ["prepare ada", "prepare cyd", "load bob", "prepare dan"]
    world.finish("prepare ada", "prepare cyd", "prepare dan")
    assert world.calls == ["load bob", "load ada"]
    world.finish("load ada")
    assert world.calls == ["load bob", "load cyd"]
    world.finish("load cyd", "load dan", "load bob")
    for borrower in borrowers:
        borrower.release()


def test_an_error_inside_the_lease_ends_it(make_world: MakeWorld) -> None:
    world = make_world()
    world.bring("ada")

    async def fail() -> None:
        async with world.pool.lease("ada"):
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        world.do(fail())
    assert [model.leases for model in world.pool.residents()] == [0]


# --- Waiters that leave ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("begun", ["prepare", "load"])
def test_a_load_goes_on_when_its_waiter_is_cancelled(make_world: MakeWorld, begun: str) -> None:
    world = make_world()
    ada = world.lease("ada")
    if begun == "load":
        world.finish("prepare ada")
    ada.cancel()
    assert ada.state == "cancelled"
    assert world.pool.num_waiting == 0
    if begun == "prepare":
        world.finish("prepare ada")
    world.finish("load ada")
    assert repr(world.pool) == "<ModelPool [1 of 4 bytes; ada: resident, 1 bytes from disk, idle 0 s]>"


def test_one_waiter_leaving_does_not_disturb_the_others(make_world: MakeWorld) -> None:
    world = make_world()
    leaves, stays = world.lease("ada"), world.lease("ada")
    leaves.cancel()
    world.finish("prepare ada", "load ada")
    assert stays.state == "holding"
    assert [model.leases for model in world.pool.residents()] == [1]
    stays.release()


def test_a_waiter_cancelled_in_the_tick_in_which_its_model_arrives_leaks_nothing(make_world: MakeWorld) -> None:
    world = make_world()
    ada = world.lease("ada")
    world.finish("prepare ada")
    call = world.threads.calls.pop()
    call.future.set_result(call.function(call.about))
    ada.task.cancel()
    world.settle()
    assert ada.state == "cancelled"
    assert repr(world.pool) == "<ModelPool [1 of 4 bytes; ada: resident, 1 bytes from disk, idle 0 s]>"


def test_a_load_that_no_thread_has_begun_is_dropped_with_its_last_waiter(make_world: MakeWorld) -> None:
    world = make_world(max_parallel_prepares=1)
    ada, bob = world.lease("ada"), world.lease("bob")
    bob.cancel()
    assert repr(world.pool) == "<ModelPool [0 of 4 bytes; 1 waiting; ada: preparing, 1 waiters]>"
    world.finish("prepare ada", "load ada")
    assert world.calls == []
    ada.release()


def test_an_abandoned_load_evicts_the_idle_but_does_not_wait_for_the_leased(make_world: MakeWorld) -> None:
    world = make_world(budget_bytes=1)
    world.bring("ada")
    world.lease("bob").cancel()
    world.finish("prepare bob", "unload ada", "load bob")
    assert [model.key for model in world.pool.residents()] == ["bob"]

    bob = world.lease("bob")
    world.lease("cyd").cancel()
    world.finish("prepare cyd")
    assert repr(world.pool) == "<ModelPool [1 of 1 bytes; bob: resident, 1 bytes from disk, 1 leases]>"
    bob.release()


def test_those_behind_move_up_when_the_first_in_line_leaves(make_world: MakeWorld) -> None:
    world = make_world(budget_bytes=3, sizes={"big": 3})
    holder = world.lease("ada")
    world.finish("prepare ada", "load ada")
    big, bob = world.lease("big"), world.lease("bob")
    world.finish("prepare big", "prepare bob")
    assert world.calls == []
    big.cancel()
    assert world.calls == ["load bob"]
    world.finish("load bob")
    bob.release()
    holder.release()
