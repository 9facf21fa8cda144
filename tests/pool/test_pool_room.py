"""Who must go when room is short, and what never fits."""

from __future__ import annotations

import pytest

from serve.errors import (
    DeadlineExceeded,
    Overloaded,
    StoreUnavailable,
)
from tests.pool.harness import MakeWorld

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
