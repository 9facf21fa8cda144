"""Loads that fail, and what is remembered of them."""

from __future__ import annotations

import concurrent.futures
import traceback

import pytest

from serve.errors import (
    ModelGated,
    ModelNotFound,
    ModelTooLarge,
    ModelUnusable,
    Overloaded,
    RookeryError,
    StoreUnavailable,
)
from serve.pool.failures import MAX_REMEMBERED
from serve.pool.loader import LoadFailed
from tests.fakes.logs import captured_lines
from tests.pool.harness import MakeWorld


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


def test_a_loaders_own_fault_becomes_an_internal_error_without_its_text(make_world: MakeWorld) -> None:
    world = make_world()
    ada = world.lease("ada")
    with captured_lines() as lines:
        world.finish("prepare ada", error=OSError("secret path"))
    assert ada.error is not None
    assert (ada.error.code, str(ada.error)) == ("internal_error", "Model 'ada' could not be loaded: OSError.")
    (line,) = lines
    assert line["event"] == "load_failed" and isinstance(line["exc_info"], OSError)  # its kind and place are told


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


def test_an_unload_that_fails_frees_the_bytes_and_is_logged(make_world: MakeWorld) -> None:
    world = make_world(budget_bytes=1)
    world.bring("ada")
    bob = world.lease("bob")
    world.finish("prepare bob")
    with captured_lines() as lines:
        world.finish("unload ada", error=OSError("cannot"))
        world.loader.slots.clear()
        world.finish("load bob")
    assert bob.state == "holding"
    assert [line["model"] for line in lines if line["event"] == "unload_failed"] == ["ada"]
    bob.release()


def test_an_observer_that_fails_does_not_hurt_the_pool(make_world: MakeWorld) -> None:
    world = make_world()

    def fail(_: object) -> None:
        raise ZeroDivisionError

    world.pool._on_event = fail
    with captured_lines() as lines:
        world.bring("ada")
    assert [model.key for model in world.pool.residents()] == ["ada"]
    assert [line["kind"] for line in lines if line["event"] == "pool_observer_failed"] == ["Loaded"]
