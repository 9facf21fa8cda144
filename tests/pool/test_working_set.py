"""Which models are in use, and how many bytes they take: whether or not they found room."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from serve.pool.working_set import MAX_REMEMBERED, WorkingSet
from tests.pool.harness import MakeWorld


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_model_counts_once_however_often_it_is_asked_for() -> None:
    asked = WorkingSet(60, Clock())
    for key in ("ada", "bob", "ada"):
        asked.note(key, 10)
    assert asked.num_bytes == 20


def test_a_model_counts_for_the_window_since_it_was_last_asked_for() -> None:
    clock = Clock()
    asked = WorkingSet(60, clock)
    asked.note("ada", 10)
    asked.note("bob", 1)
    clock.now = 50
    asked.note("ada", 10)
    clock.now = 61
    assert asked.num_bytes == 10
    clock.now = 111
    assert asked.num_bytes == 0


def test_the_size_that_was_last_said_counts() -> None:
    asked = WorkingSet(60, Clock())
    asked.note("ada", 10)
    asked.note("ada", 7)
    assert asked.num_bytes == 7


def test_it_remembers_a_bounded_number() -> None:
    asked = WorkingSet(60, Clock())
    for number in range(MAX_REMEMBERED + 5):
        asked.note(str(number), 1)
    assert asked.num_bytes == MAX_REMEMBERED


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 40), st.integers(1, 100))))
def test_it_is_the_sum_over_the_distinct_models_of_the_window(events: list[tuple[int, int, int]]) -> None:
    clock = Clock()
    asked = WorkingSet(60, clock)
    last: dict[str, tuple[float, int]] = {}
    for key, passed_s, num_bytes in events:
        clock.now += passed_s
        asked.note(str(key), num_bytes)
        last[str(key)] = (clock.now, num_bytes)
        assert asked.num_bytes == sum(size for at, size in last.values() if clock.now - at <= 60)


def test_models_that_push_each_other_out_of_a_pool_all_count(make_world: MakeWorld) -> None:
    world = make_world(4, sizes={"ada": 3, "bob": 3, "eve": 3}, working_set_s=60)
    for key in ("ada", "bob", "eve", "ada"):
        borrower = world.lease(key)
        world.finish(f"prepare {key}")
        if unload := [name for name in world.calls if name.startswith("unload")]:
            world.finish(*unload)
        world.finish(f"load {key}")
        borrower.release()
    assert (world.pool.used_bytes, world.pool.asked_bytes) == (3, 9)


def test_a_model_that_waits_for_room_counts_and_one_that_fits_no_pool_does_not(make_world: MakeWorld) -> None:
    world = make_world(4, sizes={"ada": 3, "bob": 3, "whale": 5}, working_set_s=60)
    world.bring("ada")
    busy = world.lease("ada")
    waiting = world.lease("bob", timeout_s=5)
    world.finish("prepare bob")
    assert world.pool.asked_bytes == 6
    too_large = world.lease("whale")
    world.finish("prepare whale")
    assert too_large.state == "refused" and world.pool.asked_bytes == 6
    world.advance(5)
    assert waiting.state == "refused" and world.pool.asked_bytes == 6
    busy.release()


def test_a_model_counts_as_asked_for_until_its_last_lease_has_ended(make_world: MakeWorld) -> None:
    world = make_world(4, sizes={"ada": 3}, working_set_s=60)
    world.bring("ada")
    long = world.lease("ada")
    world.advance(300)
    long.release()
    assert world.pool.asked_bytes == 3
    world.advance(61)
    assert world.pool.asked_bytes == 0
