"""Who steps when, and who gets a KV cache row: on a scheduler alone, in counted time."""

from __future__ import annotations

from collections.abc import Callable
from itertools import cycle
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from serve.engine.engine import EngineConfig
from serve.engine.fairness import MEMORY, TokenCounters
from serve.engine.scheduler import SLACK
from serve.engine.sequence import Sequence
from serve.types import SamplingParams
from tests.engine.harness import Harness
from tests.engine.stepping import Stepping, sequence

QUIET = 20  # a slot that no flood uses


def slowdown(
    flood: Callable[[], Sequence], quiet: Callable[[], Sequence], *, streams: int = 128, together: int = 1
) -> float:
    """The slowest of 40 quiet requests of `together` texts beside `streams` clients without a pause; alone it is 1."""
    alone, world = Stepping(), Stepping()
    texts = [quiet() for _ in range(together)]
    alone.add(*texts)
    own = alone.run(*texts)
    world.keep_busy(streams, flood)
    slowest = 0.0
    for number in range(40):
        for _ in range(10 + 7 * number % 40):
            world.step()
        texts = [quiet() for _ in range(together)]
        world.add(*texts)
        slowest = max(slowest, world.run(*texts))
    return slowest / own


@pytest.mark.parametrize("streams", [4, 8, 64, 500])
def test_a_quiet_model_is_hardly_slowed_by_one_that_floods(streams: int) -> None:
    assert slowdown(lambda: sequence(0, new=160), lambda: sequence(QUIET), streams=streams) < 1.45


def test_a_quiet_model_that_asks_for_four_texts_at_once_is_hardly_slowed_either() -> None:
    assert slowdown(lambda: sequence(0, new=160), lambda: sequence(QUIET), together=4) < 1.45


def test_a_flood_of_short_texts_or_of_long_prompts_does_not_slow_a_quiet_model_more() -> None:
    assert slowdown(lambda: sequence(0, new=2), lambda: sequence(QUIET)) < 1.45
    assert slowdown(lambda: sequence(0, new=2, prompt=500), lambda: sequence(QUIET)) < 1.45


def test_a_quiet_caller_is_hardly_slowed_by_one_that_floods_the_same_model() -> None:
    assert slowdown(lambda: sequence(0, caller="loud", new=160), lambda: sequence(0, caller="quiet")) < 1.45


def test_a_quiet_caller_is_hardly_slowed_by_one_that_floods_ten_models() -> None:
    slots = cycle(range(10))
    ratio = slowdown(lambda: sequence(next(slots), caller="loud", new=160), lambda: sequence(QUIET, caller="quiet"))
    assert ratio < 1.65  # one step of all eleven models, as it comes, is a sixth of its own 60


def test_a_popular_model_of_a_hundred_callers_does_not_slow_a_quiet_one() -> None:
    callers = cycle(f"caller {number}" for number in range(100))
    ratio = slowdown(lambda: sequence(0, caller=next(callers), new=160), lambda: sequence(QUIET, caller="quiet"))
    assert ratio < 1.45


def test_a_caller_is_not_taken_for_the_flood_of_another_on_its_model() -> None:
    world = Stepping()
    world.keep_busy(128, lambda: sequence(0, caller="loud", new=160))
    world.keep_busy(1, lambda: sequence(1, caller="elsewhere", new=160))
    for _ in range(300):
        world.step()
    text = sequence(0, caller="quiet")
    world.add(text)
    assert world.run(text) < 1.45 * 2 * 60  # two models make each step twice as long


def test_a_flood_alone_has_every_row_and_every_step() -> None:
    world = Stepping()
    world.keep_busy(128, lambda: sequence(0, new=160))
    for _ in range(10):  # their prompts
        world.step()
    for _ in range(100):
        world.step()
        assert len(world.stepped) == 64


def test_a_flood_beside_a_quiet_model_still_gets_a_fifth_of_the_time() -> None:
    world = Stepping()
    world.keep_busy(128, lambda: sequence(0, new=160))
    world.keep_busy(1, lambda: sequence(QUIET, new=160))
    began, had = world.now, world.num_tokens
    while world.now < began + 1000:
        world.step()
    # 64 rows take 3.5 of the units that time is counted in: a fifth of 1000 gives 57 such steps.
    assert world.num_tokens - had > 57 * 64


def test_equal_models_step_together() -> None:
    world = Stepping()
    for slot in range(8):
        world.keep_busy(4, lambda slot=slot: sequence(slot))  # type: ignore[misc]
    for _ in range(50):
        world.step()
    for _ in range(200):
        world.step()
        assert len(world.stepped) == 32


def test_who_finds_no_row_takes_one_from_who_holds_most_and_no_more_than_makes_them_equal() -> None:
    world = Stepping(num_rows=8)
    loud = [sequence(0, new=100) for _ in range(10)]
    world.add(*loud)
    for _ in range(5):
        world.step()
    quiet = [sequence(1, new=10) for _ in range(20)]
    world.add(*quiet)
    world.step()
    assert len(world.lost) == 4
    assert sum(one.kv_row >= 0 for one in loud) == sum(one.kv_row >= 0 for one in quiet) == 4
    assert all(one.kv_row >= 0 for one in loud[:4])  # the newest lose their rows: they lose the least
    world.step()
    assert len(world.lost) == 4
    world.run(*loud, *quiet)


def test_a_preempted_sequence_goes_on_where_it_was() -> None:
    world = Stepping(num_rows=1)
    loser = sequence(0, caller="a", new=20)
    world.add(loser)
    for _ in range(7):
        world.step()
    assert loser.num_computed == 11 and len(loser.output_ids) == 7
    world.scheduler._preempt(loser)
    assert world.lost == [(0, 12)]
    assert loser.next_tokens(6) == (0, 1, 2, 3, 4, 0)
    world.run(loser)
    assert len(loser.output_ids) == 20


def test_texts_that_lost_their_rows_on_the_way_are_those_of_transformers(tmp_path: Path) -> None:
    harness = Harness(tmp_path, 2, EngineConfig(max_sequences=2))
    long = SamplingParams(temperature=0, max_new_tokens=40, ignore_eos=True)
    early = [harness.submit(0, harness.sequence(0, prompt, long)) for prompt in ([1, 2, 3], [4, 5])]
    harness.wait_tokens(early[1], 5)
    late = harness.submit(1, harness.sequence(1, [6, 7], prompt_logprobs=True))
    harness.wait([*early, late])
    for model, prompt, got in ((0, [1, 2, 3], early[0]), (0, [4, 5], early[1]), (1, [6, 7], late)):
        with torch.inference_mode():
            count = len(got.ids)
            ids = harness.reference(model).generate(
                torch.tensor([prompt]), do_sample=False, min_new_tokens=count, max_new_tokens=count, pad_token_id=0
            )
        assert got.ids == ids[0, len(prompt) :].tolist()
    assert [token.id for token in late.prompt] == [6, 7]
    harness.engine.close()


def test_idleness_is_not_saved_and_leads_are_forgotten_beyond_a_bound() -> None:
    counters: TokenCounters[str] = TokenCounters()
    counters.enter("busy")
    counters.charge({"busy": 500})
    counters.enter("late")
    assert counters.served("late") == 500
    counters.charge({"busy": 1e9})
    assert counters.served("busy") == 500 + MEMORY
    counters.leave("late")
    counters.leave("busy")
    assert len(counters) == 0


class SchedulerLaws(RuleBasedStateMachine):
    """Random arrivals, departures and steps; the laws hold after each."""

    NUM_ROWS = 6

    def __init__(self) -> None:
        super().__init__()
        self.world = Stepping(num_rows=self.NUM_ROWS, max_step_rows=16)
        self.open: list[Sequence] = []
        self.unserved: dict[Sequence, int] = {}  # steps that it sat out, with a row, since its last

    @rule(
        slot=st.integers(0, 3),
        caller=st.sampled_from(["", "a", "b"]),
        prompt=st.integers(1, 40),
        new=st.integers(1, 30),
        count=st.integers(1, 8),
    )
    def arrive(self, slot: int, caller: str, prompt: int, new: int, count: int) -> None:
        texts = [sequence(slot, caller=caller, prompt=prompt, new=new) for _ in range(count)]
        self.world.add(*texts)
        self.open += texts

    @precondition(lambda self: self.open)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        gone = data.draw(st.sampled_from(self.open))
        gone.cancelled = True
        assert self.world.scheduler.cancelled() == [gone]
        self.world.scheduler.remove(gone)
        gone.cancelled = False
        self.open.remove(gone)

    @rule(count=st.integers(1, 40))
    def step(self, count: int) -> None:
        for _ in range(count):
            before = len(self.world.lost)
            self.world.step()
            self.open = [one for one in self.open if one not in self.world.ended]
            assert len(self.world.lost) - before <= 2 * self.NUM_ROWS, "rows went round in circles"
            running = [one for one in self.open if one.kv_row >= 0]
            stepped = set(self.world.stepped)
            self.unserved = {one: 0 if one in stepped else self.unserved.get(one, 0) + 1 for one in running}

    @invariant()
    def every_row_is_free_or_held_by_one(self) -> None:
        held = [one.kv_row for one in self.open if one.kv_row >= 0]
        assert sorted(held + self.world.scheduler._free_rows) == list(range(self.NUM_ROWS))

    @invariant()
    def nobody_with_a_row_starves(self) -> None:
        # Six rows of at most four models: all of them cost less than 4 * 24 + 16 rows, and are earned at 6 a step.
        assert max(self.unserved.values(), default=0) <= 4 * (4 * 24 + 16) // 24 * 4

    @invariant()
    def counters_are_bounded_and_belong_to_those_who_run(self) -> None:
        scheduler = self.world.scheduler
        running = [one for one in self.open if one.kv_row >= 0]
        assert set(scheduler._callers._served) == {one.caller for one in running}
        assert set(scheduler._models._served) == {one.slot for one in running}
        for counters in (scheduler._callers._served, scheduler._models._served):
            if counters:
                assert max(counters.values()) <= min(counters.values()) + MEMORY

    @invariant()
    def who_is_least_served_steps(self) -> None:
        scheduler = self.world.scheduler
        if scheduler._running:
            behind, _ = scheduler._split()
            least = min(scheduler._served((one.caller, one.slot)) for one in scheduler._running)
            assert behind
            assert all(scheduler._served((one.caller, one.slot)) <= least + SLACK for one in behind)

    def teardown(self) -> None:
        """Everybody gets to the end."""
        for _ in range(200_000):
            if not self.open:
                break
            self.step(1)
        assert not self.open, "somebody starved"
        assert self.world.scheduler.is_idle


SchedulerLaws.TestCase.settings = settings(max_examples=60, stateful_step_count=40)
TestSchedulerLaws = SchedulerLaws.TestCase
