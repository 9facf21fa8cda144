"""Signs of life, and what their absence means."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator
from contextlib import aclosing

import pytest

from deployments.pulse import PULSE_S, SILENCE_S, Silence, listen, with_pulse


class Source:
    """Gives what is put into it; None ends it."""

    def __init__(self) -> None:
        self.queue: asyncio.Queue[list[int] | Exception | None] = asyncio.Queue()
        self.is_closed = False

    async def items(self) -> AsyncIterator[list[int]]:
        try:
            while (item := await self.queue.get()) is not None:
                if isinstance(item, Exception):
                    raise item
                yield item
        finally:
            self.is_closed = True


async def test_it_beats_before_the_first_piece_between_any_two_and_before_the_end() -> None:
    source = Source()
    heard = []
    to_tell: list[list[int] | None] = [[1], [2], None]
    async with aclosing(with_pulse(source.items(), every_s=0.001)) as items:
        async for item in items:
            heard.append(item)
            if heard[-3:] == [[], [], []]:
                source.queue.put_nowait(to_tell.pop(0))
    assert [item for item in heard if item] == [[1], [2]]
    assert heard.index([1]) >= 3 and heard.index([2]) >= heard.index([1]) + 4 and heard[-3:] == [[], [], []]


async def test_who_tells_in_time_needs_no_beat_and_is_asked_for_one_piece_at_a_time() -> None:
    asked = 0

    async def count() -> AsyncIterator[list[int]]:
        nonlocal asked
        for asked in range(1, 6):
            yield [asked]

    heard = []
    async for item in with_pulse(count()):
        await asyncio.sleep(0)
        heard.append(item)
        assert asked == len(heard)
    assert heard == [[1], [2], [3], [4], [5]]


@pytest.mark.parametrize("steps", [[1, 6, 1], [0, 3, 3]], ids=["a whole text", "texts that wait for places"])
async def test_what_takes_longer_than_the_silence_is_heard_to_its_end(steps: list[int]) -> None:
    silence_s = 0.1

    async def write() -> AsyncIterator[list[int]]:
        for step in steps:
            await asyncio.sleep(step * silence_s / 2)
            yield [step]

    heard = [item async for item in listen(with_pulse(write(), every_s=silence_s / 20), silence_s)]
    assert [item for item in heard if item] == [[step] for step in steps]


@pytest.mark.parametrize("told", [[], [[1]]])
async def test_an_error_passes_through(told: list[list[int]]) -> None:
    source = Source()
    for item in told:
        source.queue.put_nowait(item)
    source.queue.put_nowait(ValueError("no such model"))
    with pytest.raises(ValueError, match="no such model"):
        assert [item async for item in with_pulse(source.items())] == told


async def test_what_ends_before_it_begins_gives_nothing() -> None:
    source = Source()
    source.queue.put_nowait(None)
    assert [item async for item in with_pulse(source.items())] == []


@pytest.mark.parametrize("told", [0, 1])
async def test_who_leaves_ends_the_work(told: int) -> None:
    source = Source()
    if told:
        source.queue.put_nowait([1])
    items = with_pulse(source.items(), every_s=0.001)
    assert await anext(items) == [1] * told
    await items.aclose()
    assert source.is_closed


async def test_who_is_cancelled_ends_the_work() -> None:
    source = Source()
    began = asyncio.Event()

    async def read() -> None:
        async for _ in with_pulse(source.items(), every_s=0.001):
            began.set()

    reading = asyncio.create_task(read())
    await began.wait()
    reading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reading
    assert source.is_closed


async def test_a_listener_gives_up_who_is_silent_and_nobody_else() -> None:
    source = Source()
    source.queue.put_nowait([1])
    heard = []
    with pytest.raises(Silence):
        async for item in listen(source.items(), at_most_s=0.01):
            heard.append(item)
    assert heard == [[1]]
    source = Source()
    for told in ([1], None):
        source.queue.put_nowait(told)
    assert [item async for item in listen(source.items())] == [[1]]


async def test_who_reads_slowly_hears_no_silence() -> None:
    source = Source()
    for told in ([1], [2], None):
        source.queue.put_nowait(told)
    heard = []
    async for item in listen(source.items(), at_most_s=0.01):
        heard.append(item)
        await asyncio.sleep(0.03)  # the reader's own time
    assert heard == [[1], [2]]


async def test_as_long_as_there_is_nobody_to_be_heard_there_is_no_silence() -> None:
    since = math.inf
    source = Source()
    listening = asyncio.ensure_future(anext(listen(source.items(), at_most_s=0.01, since=lambda: since)))
    await asyncio.sleep(0.05)
    assert not listening.done()
    since = time.monotonic()
    with pytest.raises(Silence):
        await listening


async def test_a_listener_that_is_cancelled_is_cancelled_and_one_that_gave_up_goes_on() -> None:
    source = Source()
    reading = asyncio.ensure_future(anext(listen(source.items())))
    await asyncio.sleep(0)
    reading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reading
    with pytest.raises(Silence):
        await anext(listen(Source().items(), at_most_s=0.01))
    task = asyncio.current_task()
    assert task is not None
    assert task.cancelling() == 0
    await asyncio.sleep(0)


def test_several_pulses_may_be_late_or_lost_before_a_replica_is_given_up() -> None:
    assert SILENCE_S > 3 * PULSE_S
