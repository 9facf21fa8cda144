"""The pool's laws, one interleaving at a time; `test_pool_laws` searches for others."""

from __future__ import annotations

import asyncio
import concurrent.futures
import logging
import threading
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from serve.errors import (
    Conflict,
    DeadlineExceeded,
    ModelGated,
    ModelNotFound,
    ModelTooLarge,
    ModelUnusable,
    Overloaded,
    RookeryError,
    StoreUnavailable,
)
from serve.pool.loader import Evicted, Loaded, LoadFailed, Prepared
from serve.pool.pool import MAX_REMEMBERED, ModelPool
from tests.pool.harness import Slot, World

MakeWorld = Callable[..., World]


@pytest.fixture
def make_world() -> Iterator[MakeWorld]:
    """Builds worlds; closes each at the end, which checks that nothing is left behind."""
    worlds: list[World] = []

    def make(*args: Any, **options: Any) -> World:
        worlds.append(World(*args, **options))
        return worlds[-1]

    yield make
    for world in worlds:
        world.close()


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
        Evicted("ada", 3, "budget"),
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


# --- Failures -------------------------------------------------------------------------------------------------


def test_a_failed_prepare_evicts_nothing(make_world: MakeWorld) -> None:
    world = make_world(budget_bytes=2)
    world.bring("ada", "bob")
    before = repr(world.pool)
    nobody = world.lease("nobody")
    world.finish("prepare nobody", error=ModelNotFound("There is no model 'nobody'."))
    assert isinstance(nobody.error, ModelNotFound)
    assert repr(world.pool) == before
    assert world.events[-1] == LoadFailed("nobody", "model_not_found")


def test_a_model_larger_than_the_budget_is_refused_before_anything_is_evicted(make_world: MakeWorld) -> None:
    world = make_world(budget_bytes=400 << 20, sizes={"ada": 1, "xl": 498 << 20})
    world.bring("ada")
    xl = world.lease("xl")
    world.finish("prepare xl")
    assert isinstance(xl.error, ModelTooLarge)
    assert str(xl.error) == "Model 'xl' needs 498.0 MiB; the memory budget is 400.0 MiB."
    assert [model.key for model in world.pool.residents()] == ["ada"]
    assert world.calls == []


def test_a_failed_load_frees_its_bytes_and_wakes_every_waiter_with_the_reason(make_world: MakeWorld) -> None:
    world = make_world(budget_bytes=1)
    waiting = [world.lease("ada") for _ in range(3)]
    bob = world.lease("bob")
    world.finish("prepare ada", "prepare bob")
    assert world.calls == ["load ada"]
    world.finish("load ada", error=ModelUnusable("Model 'ada' holds NaN."))
    assert [str(borrower.error) for borrower in waiting] == ["Model 'ada' holds NaN."] * 3
    assert world.calls == ["load bob"]
    world.finish("load bob")
    bob.release()


def test_each_waiter_gets_an_exception_of_its_own(make_world: MakeWorld) -> None:
    world = make_world()
    waiting = [world.lease("ada") for _ in range(50)]
    error = Overloaded("Busy.", param="model", retry_after_s=3.0)
    world.finish("prepare ada", error=error)
    errors = [borrower.error for borrower in waiting if borrower.error is not None]
    assert len({id(one) for one in errors} | {id(error)}) == 51
    assert {(type(one), one.message, one.param, one.retry_after_s) for one in errors} == {
        (Overloaded, "Busy.", "model", 3.0)
    }
    assert len({len(traceback.extract_tb(one.__traceback__)) for one in errors}) == 1
    assert all(one.__context__ is None and one.__cause__ is None for one in errors)


@pytest.mark.parametrize("kind", [ModelNotFound, ModelGated, ModelUnusable])
def test_a_fact_about_a_model_is_remembered_for_a_while(make_world: MakeWorld, kind: type[RookeryError]) -> None:
    world = make_world(negative_ttl_s=60.0)
    first = world.lease("ada")
    world.finish("prepare ada", error=kind("No."))
    world.advance(59.0)
    second = world.lease("ada")
    assert (type(second.error), str(second.error)) == (kind, "No.")
    assert second.error is not first.error
    assert world.calls == []
    world.advance(1.0)
    third = world.lease("ada")
    world.finish("prepare ada", "load ada")
    assert third.state == "holding"
    third.release()


def test_what_may_pass_is_not_remembered(make_world: MakeWorld) -> None:
    world = make_world()
    ada = world.lease("ada")
    world.finish("prepare ada", error=StoreUnavailable("The Hub cannot be reached."))
    assert isinstance(ada.error, StoreUnavailable)
    again = world.lease("ada")
    world.finish("prepare ada", "load ada")
    again.release()


def test_a_loaders_own_fault_becomes_an_internal_error_without_its_text(
    make_world: MakeWorld, caplog: pytest.LogCaptureFixture
) -> None:
    world = make_world()
    ada = world.lease("ada")
    world.finish("prepare ada", error=OSError("secret path"))
    assert ada.error is not None
    assert (ada.error.code, str(ada.error)) == ("internal_error", "Model 'ada' could not be loaded: OSError.")
    assert "secret path" in caplog.text  # the log has it, with the traceback


def test_a_loader_call_that_is_cancelled_is_a_failure_too(make_world: MakeWorld) -> None:
    world = make_world()
    ada = world.lease("ada")
    world.finish("prepare ada")
    world.finish("load ada", error=concurrent.futures.CancelledError())  # as a library in the loader might
    assert ada.error is not None and ada.error.code == "internal_error"
    assert repr(world.pool) == "<ModelPool [0 of 4 bytes]>"


def test_remembered_failures_are_bounded(make_world: MakeWorld) -> None:
    world = make_world()
    for number in range(MAX_REMEMBERED + 10):
        world.lease(f"no-{number}")
        world.finish(f"prepare no-{number}", error=ModelNotFound("No."))
    assert isinstance(world.lease("no-10").error, ModelNotFound)  # the oldest that is still known
    oldest = world.lease("no-0")
    assert world.calls == ["prepare no-0"]
    oldest.cancel()


def test_an_unload_that_fails_frees_the_bytes_and_is_logged(
    make_world: MakeWorld, caplog: pytest.LogCaptureFixture
) -> None:
    world = make_world(budget_bytes=1)
    world.bring("ada")
    bob = world.lease("bob")
    world.finish("prepare bob")
    world.finish("unload ada", error=OSError("cannot"))
    world.loader.slots.clear()
    world.finish("load bob")
    assert bob.state == "holding"
    assert "model_unload_failed model_id='ada'" in caplog.text
    bob.release()


def test_an_observer_that_fails_does_not_hurt_the_pool(make_world: MakeWorld, caplog: pytest.LogCaptureFixture) -> None:
    world = make_world()

    def fail(_: object) -> None:
        raise ZeroDivisionError

    world.pool._on_event = fail
    world.bring("ada")
    assert [model.key for model in world.pool.residents()] == ["ada"]
    assert "pool_observer_failed event=Loaded" in caplog.text


# --- Who must go ----------------------------------------------------------------------------------------------


def test_the_least_recently_used_goes_first(make_world: MakeWorld) -> None:
    world = make_world(budget_bytes=3)
    world.bring("ada", "bob", "cyd")
    world.lease("ada").release()  # now bob is the oldest
    world.lease("dan")
    world.finish("prepare dan")
    assert world.calls == ["unload bob"]


def test_a_model_that_costs_more_to_reload_ages_slower(make_world: MakeWorld) -> None:
    world = make_world(budget_bytes=2, tiers={"warm": "host", "cold": "hub"})
    world.bring("cold", "warm")
    world.lease("dan")
    world.finish("prepare dan")
    assert world.calls == ["unload warm"]  # idle half as long, but it is back in no time


def test_a_costly_model_goes_when_it_has_been_idle_long_enough(make_world: MakeWorld) -> None:
    world = make_world(budget_bytes=2, tiers={"warm": "host", "cold": "hub"})
    world.bring("cold")
    world.advance(10.0)
    world.bring("warm")
    world.lease("dan")
    world.finish("prepare dan")
    assert world.calls == ["unload cold"]


def test_no_more_are_evicted_than_needed(make_world: MakeWorld) -> None:
    world = make_world(budget_bytes=4, sizes={"big": 3, "huge": 3})
    world.bring("ada", "big")
    world.lease("huge")
    world.finish("prepare huge")
    assert world.calls == ["unload big"]  # with ada, the older one, gone it would still be needed


def test_bytes_that_are_leaving_count_before_another_is_evicted(make_world: MakeWorld) -> None:
    world = make_world(budget_bytes=2)
    world.bring("ada", "bob")
    world.spawn(world.pool.forget(lambda key: key == "bob"))
    world.lease("cyd")
    world.finish("prepare cyd")
    assert world.calls == ["unload bob"]


def test_a_leased_or_loading_model_is_never_a_victim_and_waiters_proceed_in_turn(make_world: MakeWorld) -> None:
    world = make_world(budget_bytes=2)
    ada = world.lease("ada")
    world.finish("prepare ada", "load ada")
    bob = world.lease("bob")
    world.finish("prepare bob")
    assert world.calls == ["load bob"]
    first, second = world.lease("cyd"), world.lease("dan")
    world.finish("prepare dan", "prepare cyd")  # dan is known first, so dan is first in line
    assert world.calls == ["load bob"]
    world.finish("load bob")
    assert world.calls == []

    bob.release()
    assert world.calls == ["unload bob"]
    world.finish("unload bob")
    assert world.calls == ["load dan"]
    ada.release()
    assert world.calls == ["load dan", "unload ada"]
    world.finish("load dan", "unload ada", "load cyd")
    first.release()
    second.release()


def test_a_small_model_does_not_overtake_a_large_one(make_world: MakeWorld) -> None:
    world = make_world(budget_bytes=3, sizes={"big": 3})
    ada = world.lease("ada")
    world.finish("prepare ada", "load ada")
    big, bob = world.lease("big"), world.lease("bob")
    world.finish("prepare big", "prepare bob")
    assert world.calls == []  # two bytes are free, but they are kept for the first in line
    ada.release()
    world.finish("unload ada", "load big")
    assert big.state == "holding"
    big.release()
    world.finish("unload big", "load bob")
    bob.release()


def test_a_just_loaded_model_is_spared_until_it_was_used(make_world: MakeWorld) -> None:
    world = make_world(budget_bytes=2, min_residency_s=5.0)
    holder = world.lease("ada")
    world.finish("prepare ada", "load ada")
    world.lease("bob").cancel()
    world.finish("prepare bob", "load bob")  # loaded for nobody
    cyd = world.lease("cyd")
    world.finish("prepare cyd")
    assert world.calls == []
    world.lease("bob").release()
    assert world.calls == ["unload bob"]
    world.finish("unload bob", "load cyd")
    cyd.release()
    holder.release()


def test_a_just_loaded_model_is_spared_until_the_time_has_passed(make_world: MakeWorld) -> None:
    world = make_world(budget_bytes=2, min_residency_s=5.0, patience_s=10.0)
    holder = world.lease("ada")
    world.finish("prepare ada", "load ada")
    world.lease("bob").cancel()
    world.finish("prepare bob", "load bob")
    cyd = world.lease("cyd")
    world.finish("prepare cyd")
    world.advance(4.9)
    assert world.calls == []
    world.advance(0.1)
    assert world.calls == ["unload bob"]
    world.finish("unload bob", "load cyd")
    cyd.release()
    holder.release()


def test_a_just_loaded_model_goes_when_nothing_else_would_ever_free_the_room(make_world: MakeWorld) -> None:
    world = make_world(budget_bytes=2, sizes={"big": 2}, min_residency_s=5.0)
    world.lease("ada").cancel()
    world.finish("prepare ada", "load ada")
    big = world.lease("big")
    world.finish("prepare big")
    assert world.calls == ["unload ada"]
    world.finish("unload ada", "load big")
    big.release()


def test_a_model_leased_without_a_pause_does_not_keep_others_out_for_ever(make_world: MakeWorld) -> None:
    world = make_world(budget_bytes=1, patience_s=10.0)
    first = world.lease("ada")
    world.finish("prepare ada", "load ada")
    bob = world.lease("bob")
    world.finish("prepare bob")

    # For ten seconds, overlapping leases of ada go first.
    world.advance(9.9)
    second = world.lease("ada")
    first.release()
    assert second.state == "holding"

    # Then ada is closed to new leases: they queue behind bob, and the one under way finishes.
    world.advance(0.1)
    third = world.lease("ada")
    world.finish("prepare ada")
    assert repr(world.pool) == (
        "<ModelPool [1 of 1 bytes; 2 waiting; ada: resident, 1 bytes from disk, 1 leases, budget; "
        "bob: waiting, 1 bytes from disk, 1 waiters; ada: waiting, 1 bytes from disk, 1 waiters]>"
    )
    second.release()
    world.finish("unload ada", "load bob")
    bob.release()
    world.finish("unload bob", "load ada")
    third.release()


def test_patience_closes_no_more_leased_models_than_needed(make_world: MakeWorld) -> None:
    world = make_world(budget_bytes=2, patience_s=10.0)
    ada, bob = world.lease("ada"), world.lease("bob")
    world.finish("prepare ada", "prepare bob", "load ada", "load bob")
    cyd = world.lease("cyd")
    world.finish("prepare cyd")
    world.advance(10.0)
    world.lease("bob").release()  # each release makes the pool decide again
    assert [(model.key, model.leaving) for model in world.pool.residents()] == [("ada", True), ("bob", False)]
    ada.release()
    world.finish("unload ada", "load cyd")
    cyd.release()
    bob.release()


@pytest.mark.parametrize("error", [None, StoreUnavailable("No.")])
def test_an_abandoned_load_that_ends_lets_the_next_in_line_proceed(
    make_world: MakeWorld, error: Exception | None
) -> None:
    world = make_world(budget_bytes=1)
    ada, bob = world.lease("ada"), world.lease("bob")
    world.finish("prepare ada", "prepare bob")
    ada.cancel()
    world.finish("load ada", error=error)
    assert world.calls == (["load bob"] if error else ["unload ada"])
    if error is None:
        world.finish("unload ada")
    world.finish("load bob")
    bob.release()


def test_forgetting_the_first_in_line_lets_the_next_proceed(make_world: MakeWorld) -> None:
    world = make_world(budget_bytes=2, sizes={"big": 2})
    world.bring("ada")
    world.lease("big").cancel()
    bob = world.lease("bob")
    world.finish("prepare big", "prepare bob")
    assert world.calls == ["unload ada"]  # for big, which nobody waits for any more
    world.do(world.pool.forget(lambda key: key == "big"))
    assert world.calls == ["unload ada", "load bob"]
    world.finish("unload ada", "load bob")
    bob.release()


# --- Limits ---------------------------------------------------------------------------------------------------


def test_a_lease_not_had_in_time_ends_in_deadline_exceeded_and_the_load_goes_on(make_world: MakeWorld) -> None:
    world = make_world()
    ada = world.lease("ada", timeout_s=3.0)
    world.advance(2.9)
    assert ada.state == "waiting"
    world.advance(0.1)
    assert isinstance(ada.error, DeadlineExceeded)
    assert str(ada.error) == "Model 'ada' was not in memory after 3 s (preparing); try again."
    world.finish("prepare ada", "load ada")
    assert [model.key for model in world.pool.residents()] == ["ada"]


def test_the_deadline_of_waiting_does_not_end_a_lease(make_world: MakeWorld) -> None:
    world = make_world()
    ada = world.lease("ada", timeout_s=3.0)
    world.finish("prepare ada", "load ada")
    world.advance(100.0)
    assert ada.state == "holding"
    ada.release()


def test_too_many_waiting_is_overloaded_but_warm_models_are_leased(make_world: MakeWorld) -> None:
    world = make_world(max_waiting=2)
    world.bring("ada")
    waiting = [world.lease("bob"), world.lease("cyd")]
    refused = world.lease("bob")
    assert isinstance(refused.error, Overloaded)
    assert refused.error.retry_after_s is not None and refused.error.retry_after_s >= 1.0
    warm = world.lease("ada")
    assert warm.state == "holding"
    world.finish("prepare bob", "prepare cyd", "load bob", "load cyd")
    for borrower in (*waiting, warm):
        borrower.release()


# --- Pins, forgetting, closing --------------------------------------------------------------------------------


def test_a_pinned_model_stays_until_it_is_unpinned(make_world: MakeWorld) -> None:
    world = make_world(budget_bytes=2)
    pinning = world.spawn(world.pool.pin("base"))
    world.finish("prepare base", "load base")
    assert pinning.done()
    world.bring("ada")
    bob = world.lease("bob")
    world.finish("prepare bob")
    assert world.calls == ["unload ada"]  # though base has been idle for longer
    world.finish("unload ada", "load bob")
    cyd = world.lease("cyd")
    world.finish("prepare cyd")
    assert world.calls == []
    world.do(world.pool.unpin("base"))
    assert world.calls == ["unload base"]
    world.finish("unload base", "load cyd")
    bob.release()
    cyd.release()


def test_pins_have_a_budget(make_world: MakeWorld) -> None:
    world = make_world(budget_bytes=4 << 20, pin_budget_bytes=2 << 20, sizes={"ada": 1 << 20, "bob": 2 << 20})
    world.bring("ada", "bob")
    world.do(world.pool.pin("ada"))
    world.do(world.pool.pin("ada"))  # a second time changes nothing
    with pytest.raises(Conflict) as refusal:
        world.do(world.pool.pin("bob"))
    assert str(refusal.value) == (
        "Pinning model 'bob' (2.0 MiB) beside 1.0 MiB already pinned exceeds the budget for pins, 2.0 MiB; "
        "unpin another model first."
    )
    assert [(model.key, model.pinned) for model in world.pool.residents()] == [("ada", True), ("bob", False)]


def test_a_model_that_can_never_fit_beside_the_pins_is_refused_and_holds_nobody_up(make_world: MakeWorld) -> None:
    world = make_world(budget_bytes=3, sizes={"big": 3})
    ada = world.lease("ada")
    world.finish("prepare ada", "load ada")
    big, bob = world.lease("big"), world.lease("bob")
    world.finish("prepare big", "prepare bob")
    world.do(world.pool.pin("ada"))
    assert isinstance(big.error, Overloaded)
    world.finish("load bob")
    later = world.lease("big")
    world.finish("prepare big")
    assert isinstance(later.error, Overloaded)  # not remembered: pins change
    bob.release()
    ada.release()


def test_a_forgotten_model_is_loaded_anew_and_its_leases_end_in_peace(make_world: MakeWorld) -> None:
    world = make_world(budget_bytes=2)
    old = world.lease("ada")
    world.finish("prepare ada", "load ada")
    world.do(world.pool.forget(lambda key: key == "ada"))
    assert repr(world.pool) == "<ModelPool [1 of 2 bytes; ada: resident, 1 bytes from disk, 1 leases, forgotten]>"
    new = world.lease("ada")
    world.finish("prepare ada", "load ada")
    assert old.lease is not None and new.lease is not None
    assert old.lease.slot is not new.lease.slot
    assert [model.leaving for model in world.pool.residents()] == [True, False]
    old.release()
    world.finish("unload ada")
    assert world.events[-1] == Evicted("ada", 1, "forgotten")
    assert new.lease.slot.loaded
    new.release()


def test_forget_returns_when_the_idle_ones_are_out_of_memory(make_world: MakeWorld) -> None:
    world = make_world()
    world.bring("ada", "bob")
    forgetting = world.spawn(world.pool.forget(lambda key: key == "ada"))
    assert not forgetting.done()
    world.finish("unload ada")
    assert forgetting.done()
    assert [model.key for model in world.pool.residents()] == ["bob"]


def test_a_load_under_way_when_forgotten_serves_those_who_wait_and_goes(make_world: MakeWorld) -> None:
    world = make_world()
    waits = world.lease("ada")
    world.lease("bob").cancel()
    world.do(world.pool.forget(lambda key: True))
    world.finish("prepare ada", "prepare bob", "load ada")
    assert waits.state == "holding"
    assert world.calls == []  # nobody waits for bob
    waits.release()
    assert world.calls == ["unload ada"]


def test_forgetting_ends_remembered_failures_also_those_on_their_way(make_world: MakeWorld) -> None:
    world = make_world()
    world.lease("ada")
    world.finish("prepare ada", error=ModelNotFound("No."))
    late = world.lease("bob")
    world.do(world.pool.forget(lambda key: True))
    world.finish("prepare bob", error=ModelNotFound("No."))  # it looked before the model was published
    assert isinstance(late.error, ModelNotFound)
    published = [world.lease("ada"), world.lease("bob")]
    world.finish("prepare ada", "prepare bob", "load ada", "load bob")
    for borrower in published:
        borrower.release()


def test_close_waits_for_loads_and_leases_and_unloads_everything(make_world: MakeWorld) -> None:
    world = make_world(budget_bytes=3, max_parallel_prepares=2)
    world.bring("idle")
    leased, loading = world.lease("leased"), world.lease("loading")
    world.finish("prepare leased", "load leased", "prepare loading")
    no_room = world.lease("no-room")
    world.do(world.pool.pin("idle"))
    world.finish("prepare no-room")
    preparing, other = world.lease("preparing"), world.lease("other")
    queued = world.lease("queued")
    closing = world.spawn(world.pool.close())
    assert isinstance(no_room.error, Overloaded)
    late = world.lease("idle")
    assert isinstance(late.error, Overloaded)

    world.finish("unload idle", "prepare preparing", "prepare other", "load loading")
    assert [type(borrower.error) for borrower in (preparing, other, queued)] == [Overloaded] * 3
    assert loading.state == "holding"
    assert not closing.done()
    loading.release()
    leased.release()
    world.finish("unload loading")
    assert not closing.done()
    world.finish("unload leased")
    assert closing.done()
    assert world.threads.is_shut
    assert repr(world.pool) == "<ModelPool [0 of 3 bytes; closed]>"
    assert {event.reason for event in world.events if isinstance(event, Evicted)} == {"closed"}


def test_each_event_is_one_log_line(make_world: MakeWorld, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="serve.pool.pool")
    world = make_world(budget_bytes=1)
    world.bring("ada")
    world.lease("no\nbody")
    world.finish("prepare no\nbody", error=ModelNotFound("No."))
    world.spawn(world.pool.forget(lambda key: True))
    world.finish("unload ada")
    assert caplog.messages == [
        "model_loaded model_id='ada' bytes=1 tier=disk duration_s=0.000",
        "model_load_failed model_id='no\\nbody' state=preparing error=ModelNotFound: No.",
        "model_evicted model_id='ada' bytes=1 reason=forgotten",
    ]


# --- On real threads ------------------------------------------------------------------------------------------


class ThreadedLoader:
    """Counts bytes on the threads themselves; `gate` holds the loads of the keys in it."""

    def __init__(self, budget_bytes: int) -> None:
        self.budget_bytes = budget_bytes
        self.gates: dict[str, threading.Event] = {}
        self._lock = threading.Lock()
        self.used_bytes = 0
        self.num_loads = 0

    def prepare(self, key: str) -> Prepared[str]:
        if key.startswith("no-"):
            raise ModelNotFound("No.")
        return Prepared(1 + len(key) % 3, "disk", key)

    def load(self, prepared: Prepared[str]) -> Slot:
        with self._lock:
            self.used_bytes += prepared.num_bytes
            self.num_loads += 1
            assert self.used_bytes <= self.budget_bytes
        if gate := self.gates.get(prepared.payload):
            gate.wait()
        return Slot(prepared.payload, prepared.num_bytes)

    def unload(self, slot: Slot) -> None:
        with self._lock:
            assert slot.loaded
            slot.loaded = False
            self.used_bytes -= slot.num_bytes


async def test_on_real_threads_a_hung_load_holds_up_nobody_else() -> None:
    loader = ThreadedLoader(9)
    loader.gates["hangs"] = threading.Event()
    pool: ModelPool[str, Slot] = ModelPool(loader, budget_bytes=9)
    async with pool.lease("ada"):
        hung = asyncio.ensure_future(pool.pin("hangs"))
        async with pool.lease("bob", timeout_s=60) as bob, pool.lease("ada", timeout_s=60) as ada:
            assert (bob.tier, ada.tier) == ("disk", "device")
        assert not hung.done()
    loader.gates["hangs"].set()
    await hung
    await pool.close()
    assert loader.used_bytes == 0


async def test_on_real_threads_a_storm_of_leases_keeps_every_law() -> None:
    """400 leases of 14 models, room for about four: seeded, with cancellations and models that do not exist."""
    loader = ThreadedLoader(8)
    pool: ModelPool[str, Slot] = ModelPool(loader, budget_bytes=8, min_residency_s=0.001, patience_s=0.01)
    keys = ["m" * length for length in range(1, 13)] + ["no-1", "no-2"]
    granted = 0

    async def borrow(number: int) -> None:
        nonlocal granted
        key = keys[(number * number + 3 * number) % len(keys)]
        try:
            async with pool.lease(key) as lease:
                for _ in range(number % 5):
                    await asyncio.sleep(0)
                    assert lease.slot.loaded and lease.slot.key == key
                granted += 1
        except ModelNotFound:
            assert key.startswith("no-")

    tasks = [asyncio.ensure_future(borrow(number)) for number in range(400)]
    await asyncio.sleep(0)
    for task in tasks[::7]:
        task.cancel()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert {type(result) for result in results} == {type(None), asyncio.CancelledError}
    assert granted > 200
    assert pool.num_waiting == 0
    assert all(model.leases == 0 for model in pool.residents())
    await pool.close()
    assert loader.used_bytes == 0
    assert repr(pool) == "<ModelPool [0 of 8 bytes; closed]>"
