"""The flush clock: how often and when calls are woken."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial

from serve.flush import FlushClock


class Reader:
    """A call that counts its wake-ups, and when they came."""

    def __init__(self) -> None:
        self.woken_at: list[float] = []

    def wake(self) -> None:
        self.woken_at.append(asyncio.get_running_loop().time())


async def run(clock: FlushClock, wakes: list[Callable[[], None]], *, step_s: float, steps: int) -> None:
    """Each step has something new for every call."""
    for _ in range(steps):
        for wake in wakes:
            clock.wake_later(wake)
        await asyncio.sleep(step_s)


async def test_all_calls_are_woken_in_the_same_turn() -> None:
    clock, order = FlushClock(0.02), list[int]()
    for number in range(8):
        clock.wake_later(partial(order.append, number))
    assert order == []
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert order == list(range(8))


async def test_a_call_that_asks_often_is_woken_once_for_each_interval() -> None:
    reader, clock = Reader(), FlushClock(0.05)
    await run(clock, [reader.wake], step_s=0.001, steps=40)  # at least 40 ms
    await asyncio.sleep(0.06)
    gaps = [later - earlier for earlier, later in zip(reader.woken_at, reader.woken_at[1:], strict=False)]
    assert gaps
    assert min(gaps) >= 0.049


async def test_more_calls_are_woken_less_often_so_that_all_together_stay_under_the_limit() -> None:
    readers, clock = [Reader() for _ in range(20)], FlushClock(0.001, pieces_per_s=400)
    await run(clock, [reader.wake for reader in readers], step_s=0.002, steps=60)
    gaps = [b - a for reader in readers for a, b in zip(reader.woken_at, reader.woken_at[1:], strict=False)]
    assert gaps
    assert min(gaps) >= 0.049  # 20 calls at 400 pieces a second


async def test_however_many_there_are_nobody_waits_longer_than_the_longest_interval() -> None:
    readers, clock = [Reader() for _ in range(50)], FlushClock(0.001, pieces_per_s=1.0, max_interval_s=0.02)
    loop = asyncio.get_running_loop()
    for reader in readers:
        clock.wake_later(reader.wake)
    await asyncio.sleep(0.005)
    asked_at = loop.time()
    again = asyncio.Event()
    clock.wake_later(again.set)
    async with asyncio.timeout(5):
        await again.wait()
    assert loop.time() - asked_at < 1.0  # 50 s at one piece a second


async def test_after_a_pause_a_call_is_woken_at_once() -> None:
    reader, clock = Reader(), FlushClock(0.01)
    clock.wake_later(reader.wake)
    await asyncio.sleep(0.03)
    clock.wake_later(reader.wake)
    await asyncio.sleep(0.005)
    assert len(reader.woken_at) == 2
