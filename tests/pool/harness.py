"""A pool whose time and threads stand still until a test moves them.

`World` holds the event loop, its clock, and every loader call the pool has made; a test finishes a call
when it likes, so that each interleaving can be written down, and the same one happens each time.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from typing import Any, TypeVar, cast

from serve.errors import RookeryError
from serve.pool.loader import Lease, PoolEvent, Prepared
from serve.pool.pool import ModelPool
from serve.types import Tier

T = TypeVar("T")


@dataclass(eq=False)
class Slot:
    """What the fake loader loads."""

    key: str
    num_bytes: int
    loaded: bool = True


@dataclass(eq=False)
class Call:
    """A loader call that the pool waits for. `about` is a key, a Prepared or a Slot."""

    kind: str
    about: Any
    function: Callable[..., Any]
    future: Future[Any]

    @property
    def key(self) -> str:
        return cast(str, getattr(self.about, "payload", None) or getattr(self.about, "key", self.about))


class ClockLoop(asyncio.SelectorEventLoop):
    """Its time moves only when told, so timeouts and timers are exact."""

    now = 1000.0

    def time(self) -> float:
        return self.now


class HeldCalls(Executor):
    """Keeps what is submitted instead of running it."""

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self.is_shut = False

    def submit(self, fn: Callable[..., T], /, *args: Any, **kwargs: Any) -> Future[T]:
        assert not self.is_shut
        future: Future[T] = Future()
        self.calls.append(Call(fn.__name__, args[0], fn, future))
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        assert not self.calls, "threads were stopped in the middle of a call"
        self.is_shut = True


class FakeLoader:
    """Sizes and tiers by key; one byte and 'disk' unless said otherwise. Keys in `missing` do not exist."""

    def __init__(self, sizes: dict[str, int], tiers: dict[str, Tier]) -> None:
        self.sizes, self.tiers = sizes, tiers
        self.slots: list[Slot] = []

    def prepare(self, key: str) -> Prepared[str]:
        return Prepared(self.sizes.get(key, 1), self.tiers.get(key, "disk"), key)

    def load(self, prepared: Prepared[str]) -> Slot:
        slot = Slot(prepared.payload, prepared.num_bytes)
        self.slots.append(slot)
        return slot

    def unload(self, slot: Slot) -> None:
        assert slot.loaded, f"{slot.key} was unloaded twice"
        slot.loaded = False
        self.slots.remove(slot)


class Borrower:
    """A task that leases `key` and holds it until told to `release`."""

    def __init__(self, world: World, key: str, timeout_s: float | None) -> None:
        self.world, self.key = world, key
        self.lease: Lease[Slot] | None = None
        self.error: RookeryError | None = None
        self._end = asyncio.Event()
        self.task = world.loop.create_task(self._run(timeout_s))

    async def _run(self, timeout_s: float | None) -> None:
        try:
            async with self.world.pool.lease(self.key, timeout_s=timeout_s) as self.lease:
                await self._end.wait()
        except RookeryError as error:
            self.error = error

    @property
    def state(self) -> str:
        if self.task.done():
            return "cancelled" if self.task.cancelled() else "refused" if self.error else "released"
        return "waiting" if self.lease is None else "holding"

    def release(self) -> None:
        self._end.set()
        self.world.settle()

    def cancel(self) -> None:
        self.task.cancel()
        self.world.settle()


class World:
    """One pool with everything around it under control. Call `close` at the end."""

    def __init__(
        self,
        budget_bytes: int = 4,
        *,
        sizes: dict[str, int] | None = None,
        tiers: dict[str, Tier] | None = None,
        **options: Any,
    ) -> None:
        self.loop = ClockLoop()
        self.threads = HeldCalls()
        self.loader = FakeLoader(sizes or {}, tiers or {})
        self.events: list[PoolEvent] = []
        options.setdefault("min_residency_s", 0.0)
        options.setdefault("limit_s", 1e9)  # calls last as long as a test likes
        self.pool: ModelPool[str, Slot] = ModelPool(
            self.loader,
            budget_bytes=budget_bytes,
            clock=self.loop.time,
            on_event=self.events.append,
            executor=self.threads,
            **options,
        )

    def settle(self) -> None:
        """Runs the loop until nothing is left to do but wait."""

        async def turns() -> None:
            for _ in range(12):
                await asyncio.sleep(0)

        self.loop.run_until_complete(turns())

    def advance(self, seconds: float) -> None:
        self.loop.now += seconds
        self.settle()

    def spawn(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        task = self.loop.create_task(work)
        self.settle()
        return task

    def do(self, work: Coroutine[Any, Any, T]) -> T:
        """For what needs no loader call to finish."""
        return self.spawn(work).result()

    def lease(self, key: str, timeout_s: float | None = None) -> Borrower:
        borrower = Borrower(self, key, timeout_s)
        self.settle()
        return borrower

    @property
    def calls(self) -> list[str]:
        """The calls under way, as 'prepare ada', oldest first."""
        return [f"{call.kind} {call.key}" for call in self.threads.calls]

    def finish(self, *names: str, error: Exception | None = None) -> None:
        """Lets the oldest call of each name ('load ada') return, or raise `error`."""
        for name in names:
            self.finish_call(self.threads.calls[self.calls.index(name)], error)

    def finish_call(self, call: Call, error: Exception | None = None) -> None:
        self.threads.calls.remove(call)
        if error is None:
            call.future.set_result(call.function(call.about))
        else:
            call.future.set_exception(error)
        self.settle()

    def bring(self, *keys: str) -> None:
        """Makes models resident and idle, in this order, one second apart."""
        for key in keys:
            borrower = self.lease(key)
            self.finish(f"prepare {key}", f"load {key}")
            borrower.release()
            self.loop.now += 1.0

    def close(self) -> None:
        """Closes the pool: loads under way finish, then everything is unloaded."""
        closing = self.spawn(self.pool.close())
        while self.threads.calls:
            self.finish_call(self.threads.calls[0])
        assert closing.done(), repr(self.pool)
        closing.result()
        assert not self.loader.slots
        self.loop.close()


MakeWorld = Callable[..., World]
