"""Which requests a generator takes on: over real engines, without HTTP."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from serve.admission import Admission, cost, cost_of
from serve.engine.scheduler import PROMPT_WEIGHT
from serve.engine.sequence import Sequence
from serve.errors import Overloaded
from serve.generator import LocalGenerator
from serve.pool.pool import ModelPool
from serve.settings import Settings
from serve.types import Delta, GenerationRequest, SamplingParams, Written
from tests.fakes.models import write_tiny_gpt2


@pytest.fixture
def data(tmp_path: Path) -> Path:
    write_tiny_gpt2(tmp_path / "models" / "test" / "tireless", n_positions=1024)  # its texts last
    return tmp_path


def start(data: Path, **changes: Any) -> LocalGenerator:
    return LocalGenerator(
        Settings(
            data=data,
            base="test/tireless",
            dtype="float32",
            memory_bytes=1 << 30,
            hub_enabled=False,
            threads=1,
            **changes,
        )
    )


def wish(num_tokens: int, caller: str = "", **more: Any) -> GenerationRequest:
    sampling: Any = {"max_new_tokens": num_tokens, "ignore_eos": True}
    return GenerationRequest("test/tireless", ("a",), sampling, caller=caller, **more)


@asynccontextmanager
async def begun(generator: LocalGenerator, request: GenerationRequest) -> AsyncIterator[None]:
    """The block in which a request is with the engine, and goes on."""
    num_before = len(generator._calls)
    task = asyncio.create_task(whole(generator, request))
    async with asyncio.timeout(10):
        while len(generator._calls) == num_before and not task.done():
            await asyncio.sleep(0.001)
    if task.done():
        await task
    try:
        yield
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


async def whole(generator: LocalGenerator, request: GenerationRequest) -> list[Delta]:
    return [delta async for deltas in generator.generate(request) for delta in deltas]


async def test_no_more_texts_wait_than_there_is_room_for_but_others_callers_are_let_in(data: Path) -> None:
    generator = start(data, max_sequences=2, max_waiting=2)
    async with begun(generator, wish(1000, "ada", num_choices=4)):
        async with asyncio.timeout(10):
            while generator.view().num_running < 2:
                await asyncio.sleep(0.001)
        with pytest.raises(Overloaded, match="2 texts wait") as refused:
            await whole(generator, wish(1, "ada"))
        assert refused.value.retry_after_s and refused.value.retry_after_s >= 1
        assert (await whole(generator, wish(3, "bob")))[-1].finish_reason == "length"
        async with begun(generator, wish(3, "ada", written=(Written(token_ids=(5,)),))):  # elsewhere
            assert len(generator._calls) == 5
        await generator.check_ready()
    await generator.close()


async def test_what_would_take_too_long_is_refused_and_what_would_not_is_written(data: Path) -> None:
    generator = start(data)
    long, short = wish(1000), wish(2)
    await whole(generator, short)
    measured_s = generator._admission._unit_s
    assert measured_s > 0
    for _ in range(1000):  # from here on the machine is slow: a second for each row of a step
        generator._admission.note_step(64, 1, 88.0)
    with pytest.raises(Overloaded, match="600 s is the limit") as refused:
        await whole(generator, long)
    assert refused.value.retry_after_s == 60
    assert not generator._calls  # nothing of it was begun
    assert (await whole(generator, short))[-1].finish_reason == "length"
    await generator.close()


async def test_requests_that_wait_for_the_same_weights_see_each_other(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator, are_there, lease = start(data, max_sequences=2, max_waiting=2), asyncio.Event(), ModelPool.lease

    @asynccontextmanager
    async def slow_lease(pool: ModelPool[Any, Any], key: str, *, timeout_s: float) -> AsyncIterator[Any]:
        await are_there.wait()
        async with lease(pool, key, timeout_s=timeout_s) as found:
            yield found

    monkeypatch.setattr(ModelPool, "lease", slow_lease)
    tasks = [asyncio.create_task(whole(generator, wish(3, "ada"))) for _ in range(10)]
    async with asyncio.timeout(10):
        while sum(task.done() for task in tasks) < 6:
            await asyncio.sleep(0.001)
        written = wish(3, "ada", written=(Written(token_ids=(5,)),))
        tasks.append(asyncio.create_task(whole(generator, written)))  # elsewhere
        are_there.set()
        ends = await asyncio.gather(*tasks, return_exceptions=True)
    refused = [end for end in ends if isinstance(end, BaseException)]
    assert len(refused) == 6 and all(isinstance(end, Overloaded) for end in refused)
    assert "2 texts wait" in str(refused[0])
    assert (await whole(generator, wish(3, "ada")))[
        -1
    ].finish_reason == "length"  # those that have begun or ended do not
    await generator.close()


# --- The arithmetic ---------------------------------------------------------------------------------------


def sequence(caller: str, num_tokens: int, *, runs: bool = True, slot: int = 0) -> Sequence:
    params = SamplingParams(max_new_tokens=num_tokens)
    made = Sequence(slot=slot, prompt_ids=(1,) * 8, params=params, vocabulary=None, caller=caller)  # type: ignore[arg-type]
    made.kv_row = 0 if runs else -1
    return made


def admission(step_s: float = 0.088, **changes: float) -> Admission:
    """A step of one model with 64 rows takes as long as that, a token of it thus a 64th."""
    made = Admission(**{"max_running": 64, "max_waiting": 64, "deadline_s": 10.0, **changes})  # type: ignore[arg-type]
    for _ in range(1000):
        made.note_step(64, 1, step_s)
    return made


def test_a_request_waits_for_no_more_of_another_callers_than_it_asks_itself() -> None:
    started = [sequence("greedy", 1000) for _ in range(8)]  # 8,000 tokens: 11 s
    admission().check("modest", [100.0], started)
    with pytest.raises(Overloaded) as refused:
        admission().check("greedy", [100.0], started)
    expected_s = (8 * (1000 + 8 * PROMPT_WEIGHT) + 100) / 64 * 0.088
    assert refused.value.retry_after_s == pytest.approx(expected_s - 10.0)


def test_a_text_is_written_token_by_token_however_empty_the_batch() -> None:
    step_of_one_s = 0.088 * 25 / 88
    admission().check("", [0.99 * 10 / step_of_one_s], [])
    with pytest.raises(Overloaded):
        admission().check("", [1.01 * 10 / step_of_one_s], [])


def test_more_models_make_steps_longer() -> None:
    started = [sequence("", 700, slot=slot) for slot in range(8)]
    admission().check("", [1.0], started[:1] * 8)
    with pytest.raises(Overloaded):
        admission().check("", [1.0], started)


def test_before_a_step_was_measured_nothing_is_too_long() -> None:
    Admission(max_running=1, max_waiting=1, deadline_s=0.001).check("", [1e9], [])


def test_the_queue_is_shared_equally_among_those_who_ask() -> None:
    started = [sequence("ada", 1, runs=number < 2) for number in range(4)] + [sequence("bob", 1, runs=False)]
    small = admission(max_running=2, max_waiting=3)
    with pytest.raises(Overloaded, match="3 texts wait"):
        small.check("ada", [1.0], started)
    small.check("bob", [1.0], started)
    small.check("eve", [1.0], started)
    small.check("ada", [1.0], started[:4])


def test_what_waits_for_weights_counts_like_what_has_begun() -> None:
    small = admission(max_running=2, max_waiting=2)
    with small.unbegun("ada", [1.0, 1.0]), small.unbegun("ada", [1.0]):
        small.check("ada", [1.0], [])  # two of the three need not wait
        with pytest.raises(Overloaded, match="2 texts wait"):
            small.check("ada", [1.0], [sequence("ada", 1)])
        small.check("bob", [1.0], [sequence("ada", 1)])
    small.check("ada", [1.0], [sequence("ada", 1)])

    slow = admission()
    with slow.unbegun("greedy", [1000.0] * 8), pytest.raises(Overloaded, match="10 s is the limit"):
        slow.check("greedy", [100.0], [])
    slow.check("greedy", [100.0], [])


def test_what_is_left_of_a_text_is_what_it_costs() -> None:
    half = sequence("", 100)
    assert cost_of(half) == cost(8, 100)
    half.num_computed, half.output_ids = 17, [1] * 10
    assert cost_of(half) == cost(1, 90)
