"""A sign of life from a replica that has nothing to tell now, so that who waits for it can tell it from a dead one.

When a process dies, its machine says so. When a machine vanishes nobody does: connections to it stay open for hours.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from typing import Any, Generic, TypeVar

PULSE_S = 4.0
# Three pulses lost. A busy replica's event loop is late by two seconds at most (2 cores, November 2026).
SILENCE_S = 15.0

T = TypeVar("T")


class Silence(Exception):
    """Nothing has come for too long."""


async def with_pulse(items: AsyncIterator[list[T]], every_s: float = PULSE_S) -> AsyncGenerator[list[T], None]:
    """The items, and an empty one whenever there has been none for so long: before the first, and between any two."""
    source = _Source(items, every_s)
    try:
        while (item := await source.next()) is not None:
            yield item
    finally:
        await source.close()


async def listen(
    items: AsyncIterator[T], at_most_s: float = SILENCE_S, since: Callable[[], float] = lambda: -math.inf
) -> AsyncGenerator[T, None]:
    """The items. Raises: Silence when there is none for so long; who reads them may take any time.

    `since` when there is somebody to be heard, by `time.monotonic`; infinite: there is nobody yet.
    """
    patience = _Patience(at_most_s, since)
    try:
        while True:
            with patience:
                try:
                    item = await anext(items)
                except StopAsyncIteration:
                    return
            yield item
    finally:
        patience.close()


class _Source(Generic[T]):
    """Reads in a task of its own, one item at a time and the next when it is asked for; one timer for all.

    An item costs 10 µs, with a task and a timer of its own 20. To wait for one in vain must not cancel the reading.
    """

    def __init__(self, items: AsyncIterator[list[T]], every_s: float) -> None:
        self._every_s, self._loop = every_s, asyncio.get_running_loop()
        self._item: list[T] | None = None
        self._asked, self._woken = asyncio.Event(), asyncio.Event()
        self._told_at = self._loop.time()
        self._timer = self._loop.call_later(every_s, self._beat)
        self._reading = self._loop.create_task(self._read(items))
        self._reading.add_done_callback(lambda _: self._woken.set())

    async def next(self) -> list[T] | None:
        """The next item; an empty one where it is late; None after the last."""
        self._asked.set()
        await self._woken.wait()
        self._woken.clear()
        self._told_at = self._loop.time()
        item, self._item = self._item, None
        if item is None and self._reading.done():
            return self._reading.result()
        return [] if item is None else item

    async def close(self) -> None:
        self._timer.cancel()
        self._reading.cancel()
        await asyncio.gather(self._reading, return_exceptions=True)

    async def _read(self, items: AsyncIterator[list[T]]) -> None:
        try:
            async for self._item in items:
                self._asked.clear()
                self._woken.set()
                await self._asked.wait()
        finally:
            if isinstance(items, AsyncGenerator):
                await items.aclose()

    def _beat(self) -> None:
        due = self._told_at + self._every_s
        if due <= self._loop.time():
            self._woken.set()
            due = self._loop.time() + self._every_s
        self._timer = self._loop.call_at(due, self._beat)


class _Patience:
    """`asyncio.timeout` for many short blocks, one after another, by one timer: 1 µs a block, not 15."""

    def __init__(self, at_most_s: float, since: Callable[[], float]) -> None:
        self._at_most_s, self._is_owed_since, self._loop = at_most_s, since, asyncio.get_running_loop()
        self._task: asyncio.Task[Any] | None = None  # that is in a block
        self._began, self._is_over = 0.0, False
        self._timer = self._loop.call_later(at_most_s, self._look)

    def __enter__(self) -> None:
        self._began, self._task = time.monotonic(), asyncio.current_task()

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        task, self._task = self._task, None
        if self._is_over and task is not None and task.uncancel() == 0 and kind is asyncio.CancelledError:
            raise Silence(f"nothing for {self._at_most_s:g} s") from None

    def close(self) -> None:
        self._timer.cancel()

    def _look(self) -> None:
        left_s = self._at_most_s - self._silent_s()
        if left_s <= 0 and self._task is not None:
            self._is_over = True
            self._task.cancel()
        else:
            self._timer = self._loop.call_later(left_s, self._look)

    def _silent_s(self) -> float:
        """For how long there has been nothing, though somebody is there and is waited for."""
        if self._task is None:
            return 0.0
        return max(0.0, time.monotonic() - max(self._began, self._is_owed_since()))
