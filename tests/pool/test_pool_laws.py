"""Searches for an order of requests, completions, failures and departures that breaks a law of the pool."""

from __future__ import annotations

from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from serve.errors import (
    Conflict,
    DeadlineExceeded,
    ModelNotFound,
    ModelTooLarge,
    ModelUnusable,
    Overloaded,
    StoreUnavailable,
)
from serve.pool.loader import Evicted, Loaded
from serve.types import Tier
from tests.pool.harness import Borrower, Call, Slot, World

BUDGET = 6
SIZES = {"a": 1, "b": 1, "c": 2, "d": 3, "whole": 6, "xl": 7}
TIERS: dict[str, Tier] = {"a": "host", "b": "disk", "c": "hub"}
MAX_WAITING = 6

keys = st.sampled_from(["a", "b", "c", "d", "a", "b", "c", "d", "whole", "xl"])


class PoolLaws(RuleBasedStateMachine):
    """Random walks over everything that can happen to a pool; the laws hold after each step."""

    def __init__(self) -> None:
        super().__init__()
        self.world = World(
            BUDGET,
            sizes=SIZES,
            tiers=TIERS,
            pin_budget_bytes=3,
            max_parallel_loads=2,
            max_parallel_prepares=3,
            min_residency_s=5.0,
            patience_s=20.0,
            negative_ttl_s=30.0,
            max_waiting=MAX_WAITING,
        )
        self.borrowers: list[Borrower] = []
        self.pinning: list[Any] = []
        self.facts: dict[str, float] = {}  # key -> until when it is known not to work
        self.pinned: set[object] = set()  # entries that were pinned after the last step
        self.retired: set[object] = set()  # entries that were closed to new leases by then

    def of_state(self, state: str) -> list[Borrower]:
        return [borrower for borrower in self.borrowers if borrower.state == state]

    def calls_of(self, kind: str) -> list[Call]:
        return [call for call in self.world.threads.calls if call.kind == kind]

    # --- What can happen ----------------------------------------------------------------------------------

    @rule(key=keys, timeout_s=st.sampled_from([None, None, 3.0]))
    def lease(self, key: str, timeout_s: float | None) -> None:
        pool = self.world.pool
        warm = [model for model in pool.residents() if model.key == key and not model.leaving]
        known_bad = self.facts.get(key, 0.0) > self.world.loop.now
        was_full = pool.num_waiting >= MAX_WAITING
        before = repr(pool)
        borrower = self.world.lease(key, timeout_s)
        self.borrowers.append(borrower)
        if warm:
            assert borrower.lease is not None and borrower.lease.tier == "device", "a warm lease had to wait"
        elif known_bad:
            assert isinstance(borrower.error, ModelNotFound | ModelUnusable | ModelTooLarge)
            assert repr(pool) == before
        elif was_full:
            assert isinstance(borrower.error, Overloaded)
            assert repr(pool) == before
        else:
            assert borrower.state == "waiting"

    @rule(key=keys)
    def use(self, key: str) -> None:
        """A lease whose calls, and all others under way, succeed at once."""
        self.lease(key, None)
        for call in self.world.threads.calls.copy():
            self.finish_one(call)
        for call in self.world.threads.calls.copy():
            self.finish_one(call)

    @precondition(lambda self: self.of_state("holding"))
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        data.draw(st.sampled_from(self.of_state("holding"))).release()

    @precondition(lambda self: self.of_state("waiting"))
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        borrower = data.draw(st.sampled_from(self.of_state("waiting")))
        borrower.cancel()
        assert borrower.state == "cancelled"

    @precondition(lambda self: self.world.threads.calls)
    @rule(data=st.data())
    def finish(self, data: st.DataObject) -> None:
        self.finish_one(data.draw(st.sampled_from(self.world.threads.calls)))

    def finish_one(self, call: Call) -> None:
        self.world.finish_call(call)
        if call.kind == "prepare" and SIZES[call.key] > BUDGET:
            self.remember(call.key)

    @precondition(lambda self: self.calls_of("prepare") or self.calls_of("load"))
    @rule(data=st.data(), error=st.sampled_from([StoreUnavailable, OSError, ModelUnusable, ModelNotFound]))
    def fail(self, data: st.DataObject, error: type[Exception]) -> None:
        call = data.draw(st.sampled_from(self.calls_of("prepare") + self.calls_of("load")))
        waiting = [b for b in self.of_state("waiting") if b.key == call.key]
        unloads = len(self.calls_of("unload"))
        self.world.finish_call(call, error("No."))
        if call.kind == "prepare":
            assert len(self.calls_of("unload")) == unloads, "a failed prepare evicted something"
        if error in (ModelNotFound, ModelUnusable):
            self.remember(call.key)
        refused = [b for b in waiting if b.state == "refused"]
        assert len({id(b.error) for b in refused}) == len(refused)

    def remember(self, key: str) -> None:
        # A load that was forgotten while under way is not remembered: ask the pool, which is checked by `lease`.
        failures = self.world.pool._failures._by_key
        if key in failures:
            self.facts[key] = failures[key][0]

    @rule(seconds=st.sampled_from([0.5, 3.0, 6.0, 25.0]))
    def advance(self, seconds: float) -> None:
        self.world.advance(seconds)

    @rule(key=keys)
    def forget(self, key: str) -> None:
        self.world.spawn(self.world.pool.forget(lambda other: other == key))
        self.facts.pop(key, None)
        assert not any(model.key == key and not model.leaving for model in self.world.pool.residents())

    @rule(key=keys)
    def pin(self, key: str) -> None:
        self.pinning.append(self.world.spawn(self.world.pool.pin(key)))

    @rule(key=keys)
    def unpin(self, key: str) -> None:
        self.pinned = {entry for entry in self.pinned if getattr(entry, "key", None) != key}
        self.world.do(self.world.pool.unpin(key))

    # --- The laws -----------------------------------------------------------------------------------------

    @invariant()
    def bytes_never_exceed_the_budget(self) -> None:
        slots = sum(slot.num_bytes for slot in self.world.loader.slots)  # those being unloaded included
        loading = sum(call.about.num_bytes for call in self.calls_of("load"))
        assert slots + loading <= self.world.pool.used_bytes <= BUDGET

    @invariant()
    def pinned_bytes_never_exceed_their_budget(self) -> None:
        assert self.world.pool.pinned_bytes <= 3

    @invariant()
    def a_leased_model_is_in_memory(self) -> None:
        leaving: list[Slot] = [call.about for call in self.calls_of("unload")]
        for borrower in self.of_state("holding"):
            assert borrower.lease is not None
            assert borrower.lease.slot.loaded
            assert borrower.lease.slot not in leaving

    @invariant()
    def victims_are_unpinned_and_leased_ones_only_when_patience_is_over(self) -> None:
        pool = self.world.pool
        for entry in pool._alive:
            if entry.retired == "budget" and entry not in self.retired:
                assert entry not in self.pinned, "a pinned model was evicted"
                if entry.leases:
                    assert self.world.loop.now - pool._queue[0].waiting_at >= 20.0
        self.pinned = {entry for entry in pool._alive if entry.pinned}
        self.retired = {entry for entry in pool._alive if entry.retired}
        assert not self.pinned & self.retired

    @invariant()
    def one_load_per_model(self) -> None:
        current = [e.key for e in self.world.pool._alive if not e.retired]
        assert len(current) == len(set(current))
        assert set(current) == set(self.world.pool._entries)

    @invariant()
    def loads_run_side_by_side_up_to_their_limit(self) -> None:
        assert len(self.calls_of("load")) <= 2
        assert len(self.calls_of("prepare")) <= 3
        ready = [e for e in self.world.pool._alive if e.state == "loading"]
        assert len(self.calls_of("load")) == min(2, len(ready)), "a thread is idle while a model could be loaded"

    @invariant()
    def leases_are_counted_exactly(self) -> None:
        held = sum(entry.leases for entry in self.world.pool._alive)
        pinning = sum(not task.done() for task in self.pinning)
        assert held == len(self.of_state("holding")) + len(self.of_state("waiting")) + pinning
        assert self.world.pool.num_waiting == len(self.of_state("waiting")) + pinning

    @invariant()
    def nobody_waits_for_nothing(self) -> None:
        """With no call under way and no lease held there is nothing left to wait for: no deadlock."""
        if not self.world.threads.calls and not self.of_state("holding"):
            assert not self.of_state("waiting") and self.world.pool.num_waiting == 0, repr(self.world.pool)

    @invariant()
    def the_first_in_line_waits_no_longer_than_patience_before_room_is_being_made(self) -> None:
        """Each model in its way is pinned, on its way in or out, or closed to new leases, unless those suffice."""
        pool = self.world.pool
        if pool._queue:
            first = pool._queue[0]
            open_for = self.world.loop.now - pool._queue[0].waiting_at
            loading = sum(e.num_bytes for e in pool._alive if e.state == "loading")
            leaving = sum(e.num_bytes for e in pool._alive if e.holds_bytes and e.retired and e.state != "loading")
            if open_for > 20.0 and not loading:
                assert first.num_bytes <= BUDGET - pool.used_bytes + leaving, repr(pool)

    @invariant()
    def errors_are_of_the_expected_kinds(self) -> None:
        for borrower in self.of_state("refused"):
            if not isinstance(
                borrower.error,
                ModelNotFound | ModelUnusable | ModelTooLarge | StoreUnavailable | Overloaded | DeadlineExceeded,
            ):
                assert borrower.error is not None and borrower.error.code == "internal_error"
        for task in self.pinning:
            if task.done() and (error := task.exception()) is not None:
                assert isinstance(error, Conflict) or hasattr(error, "code")
        self.pinning = [task for task in self.pinning if not task.done()]
        self.borrowers = [b for b in self.borrowers if b.state in ("waiting", "holding")]

    def teardown(self) -> None:
        """Everything ends: every waiter gets an answer, every slot is unloaded, every load was reported once."""
        for borrower in self.of_state("holding"):
            borrower.release()
        closing = self.world.spawn(self.world.pool.close())
        while self.world.threads.calls or self.of_state("holding"):
            for borrower in self.of_state("holding"):
                borrower.release()
            if self.world.threads.calls:
                self.world.finish_call(self.world.threads.calls[0])
        assert closing.done(), repr(self.world.pool)
        assert not self.of_state("waiting")
        for task in self.pinning:
            assert task.done() and (task.exception() is None or task.exception())
        loaded = sum(isinstance(event, Loaded) for event in self.world.events)
        evicted = sum(isinstance(event, Evicted) for event in self.world.events)
        assert loaded == evicted
        self.world.close()


PoolLaws.TestCase.settings = settings(max_examples=120, stateful_step_count=60)
TestPoolLaws = PoolLaws.TestCase
