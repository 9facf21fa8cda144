"""Models that stay, models that are forgotten, and the end of a pool."""

from __future__ import annotations

import pytest

from serve.errors import (
    Conflict,
    ModelNotFound,
    Overloaded,
)
from serve.pool.loader import Evicted
from tests.fakes.logs import captured_lines
from tests.pool.harness import MakeWorld


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
    assert world.events[-1] == Evicted("ada", 1, "forgotten", age_s=0.0)
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


def test_each_event_is_one_log_line(make_world: MakeWorld) -> None:
    with captured_lines() as lines:
        world = make_world(budget_bytes=1)
        world.bring("ada")
        world.lease("nobody")
        world.finish("prepare nobody", error=ModelNotFound("No."))
        world.spawn(world.pool.forget(lambda key: True))
        world.finish("unload ada")
    info: dict[str, object] = {"log_level": "info"}
    why = {"state": "preparing", "code": "model_not_found", "reason": "No."}
    assert lines == [
        info | {"event": "model_loaded", "model": "ada", "bytes": 1, "tier": "disk", "duration_ms": 0.0},
        info | {"event": "load_failed", "model": "nobody", **why},
        info | {"event": "model_evicted", "model": "ada", "bytes": 1, "reason": "forgotten"},
    ]
