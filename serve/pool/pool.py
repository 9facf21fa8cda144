"""Which models are in memory: leases, loads, and who must go when room is short.

    async with pool.lease("huggingtweets/ada") as lease:
        ...  # lease.slot stays where it is

A model on its way in is an entry, and an entry has one story:

    queued -> preparing -> waiting -> loading -> resident -> unloading
    (turn)    (thread)     (room)     (thread)   (leases)    (thread)

Every decision is taken synchronously on the event loop, so there is no lock; only the loader's calls are
awaited, on threads of the pool's own. Bytes count from the moment room is promised (`loading`) until
`unload` has returned, and never exceed the budget. A load that hangs keeps them as long as its thread does (`hung`).

It knows nothing of devices, files or networks: the loader does. It does not know what is in a slot either.
"""

from __future__ import annotations

import asyncio
import copy
import math
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Executor
from contextlib import asynccontextmanager
from typing import Generic

from serve.errors import (
    Conflict,
    DeadlineExceeded,
    ModelTooLarge,
    OutOfMemory,
    Overloaded,
    RookeryError,
)
from serve.logs import get_logger, ms
from serve.pool.entry import Entry, State, total_bytes
from serve.pool.failures import FACTS, Failures
from serve.pool.loader import (
    Evicted,
    EvictionReason,
    Lease,
    Loaded,
    Loader,
    LoadFailed,
    P,
    PoolEvent,
    Prepared,
    ResidentModel,
    S,
)
from serve.pool.victims import Victims
from serve.pool.watchdog import LIMIT_S, Hung, ThreadPerCall, Watchdog
from serve.pool.working_set import WINDOW_S, WorkingSet
from serve.types import Tier

log = get_logger()


class ModelPool(Generic[P, S]):
    """Keeps models in memory within `budget_bytes`, for use from one event loop.

    Room goes to loads in the order in which they were prepared; nobody overtakes. Who goes for them is the rule of
    `Victims`. Leases of resident models go first, until the first in line has waited for `patience_s` in all.

    A load for which the system has no memory is tried once more when all that is idle has gone. A call of the
    loader's that takes longer than `limit_s` is let go of: its waiters are told, its turn is another's.

    `clock` must run at the pace of the event loop's. `executor` is for tests; the pool closes it either way.
    """

    def __init__(
        self,
        loader: Loader[P, S],
        *,
        budget_bytes: int,
        pin_budget_bytes: int | None = None,
        max_parallel_loads: int = 2,
        max_parallel_prepares: int = 8,
        min_residency_s: float = 2.0,
        patience_s: float = 2.0,
        negative_ttl_s: float = 60.0,
        max_waiting: int = 1024,
        working_set_s: float = WINDOW_S,
        limit_s: float = LIMIT_S,
        clock: Callable[[], float] = time.monotonic,
        on_event: Callable[[PoolEvent], None] | None = None,
        executor: Executor | None = None,
    ) -> None:
        """`pin_budget_bytes` is half of the budget unless given."""
        self.budget_bytes = budget_bytes
        self.pin_budget_bytes = budget_bytes // 2 if pin_budget_bytes is None else pin_budget_bytes
        self._loader = loader
        self._max_parallel_loads = max_parallel_loads
        self._victims = Victims(min_residency_s, patience_s)
        self._negative_ttl_s = negative_ttl_s
        self._max_waiting = max_waiting
        self._clock = clock
        self._on_event = on_event
        # Turns, not threads, bound each kind of call, so that a download never holds up a copy, nor a copy an unload.
        self._prepare_turns = asyncio.Semaphore(max_parallel_prepares)
        self._load_turns = asyncio.Semaphore(max_parallel_loads)
        self._threads = executor or ThreadPerCall()
        self._watchdog = Watchdog(self._threads, limit_s)
        self._entries: dict[str, Entry[S]] = {}  # those a new lease can join
        self._alive: dict[Entry[S], None] = {}  # all of them, retired ones too, oldest first
        self._queue: deque[Entry[S]] = deque()  # waiting for room
        self._failures = Failures(clock)
        self._timer: asyncio.TimerHandle | None = None
        self._working_set = WorkingSet(working_set_s, clock)
        self._num_waiting = 0
        self._typical_load_s = 1.0
        self._closed = False
        self._drained = asyncio.Event()

    # --- Looking ------------------------------------------------------------------------------------------

    @property
    def used_bytes(self) -> int:
        """Bytes resident, being loaded and being unloaded; a sum, so that it cannot drift."""
        return total_bytes(entry for entry in self._alive if entry.holds_bytes)

    @property
    def pinned_bytes(self) -> int:
        return total_bytes(entry for entry in self._alive if entry.pinned)

    @property
    def asked_bytes(self) -> int:
        """Of the distinct models leased within the last `working_set_s`, or waited for, though there was no room."""
        return self._working_set.num_bytes

    @property
    def num_waiting(self) -> int:
        """How many leases wait for their model."""
        return self._num_waiting

    def residents(self) -> list[ResidentModel]:
        """Every model in a slot, the first loaded first."""
        now = self._clock()
        return [
            ResidentModel(
                key=entry.key,
                num_bytes=entry.num_bytes,
                tier=entry.tier,
                leases=entry.leases,
                idle_s=0.0 if entry.leases else now - entry.touched_at,
                pinned=entry.pinned,
                leaving=entry.retired is not None,
            )
            for entry in self._alive
            if entry.state == "resident"
        ]

    def __repr__(self) -> str:
        now = self._clock()
        parts = [f"{self.used_bytes} of {self.budget_bytes} bytes"]
        parts += [f"{self._num_waiting} waiting"] * bool(self._num_waiting) + ["closed"] * self._closed
        return f"<ModelPool [{'; '.join(parts + [entry.describe(now) for entry in self._alive])}]>"

    # --- Leases -------------------------------------------------------------------------------------------

    @asynccontextmanager
    async def lease(self, key: str, *, timeout_s: float | None = None) -> AsyncIterator[Lease[S]]:
        """Holds the model in memory; loads it first when it is not there. A resident one is leased without a wait.

        Do not wait for a second lease while holding one: two that do so can wait for each other.

        Raises: ModelNotFound and whatever else the loader says; ModelTooLarge; DeadlineExceeded after
        `timeout_s`; Overloaded when too many wait already.
        """
        started = self._clock()
        entry = self._take(key)
        try:
            tier: Tier = "device" if entry.state == "resident" else await self._settle(entry, timeout_s)
            entry.used = True
            entry.touched_at = self._clock()
            assert entry.slot is not None
            yield Lease(key, entry.slot, tier, 0.0 if tier == "device" else entry.touched_at - started)
        finally:
            self._give_back(entry)

    async def pin(self, key: str) -> None:
        """Loads the model and keeps it until `unpin` or `forget`. Raises: Conflict over the pin budget; as `lease`."""
        entry = self._take(key)
        try:
            if entry.state != "resident":
                await self._settle(entry, None)
            if entry.retired:
                raise Conflict(f"Model {key!r} was replaced while it was being pinned; pin it again.")
            others = self.pinned_bytes - entry.num_bytes * entry.pinned
            if others + entry.num_bytes > self.pin_budget_bytes:
                raise Conflict(
                    f"Pinning model {key!r} ({_mib(entry.num_bytes)}) beside {_mib(others)} already pinned exceeds the "
                    f"budget for pins, {_mib(self.pin_budget_bytes)}; unpin another model first."
                )
            entry.pinned = True
        finally:
            self._give_back(entry)

    async def unpin(self, key: str) -> None:
        """The model may be evicted again; nothing happens when it is not pinned."""
        if (entry := self._entries.get(key)) is not None:
            entry.pinned = False
            self._admit()

    async def forget(self, match: Callable[[str], bool]) -> None:
        """New leases of matching keys load anew; leases under way, and those waiting, keep what they asked for.

        Returns when the unleased ones are unloaded. Pins and remembered failures of these keys end.
        """
        self._failures.forget(match)
        await self._retire_all([entry for entry in self._entries.values() if match(entry.key)], "forgotten")

    async def relieve(self) -> None:
        """Memory is short, whatever the budget says: every idle model but the pinned ones goes. Returns when they have.

        They are loaded again when they are asked for.
        """
        unpinned = [entry for entry in self._entries.values() if entry.state == "resident" and not entry.pinned]
        await self._retire_all([entry for entry in unpinned if not entry.leases], "memory")

    def refuse(self, key: str, reason: RookeryError, for_s: float) -> None:
        """New leases of `key` raise `reason` for so long, or until `forget`. It goes when its leases have ended."""
        self._failures.remember(key, reason, for_s)
        if (entry := self._entries.get(key)) is not None:
            self._retire(entry, "refused")
        self._admit()

    async def close(self) -> None:
        """Refuses new leases, then waits for loads under way and for leases to end, and unloads everything."""
        self._closed = True
        for entry in list(self._entries.values()):
            self._retire(entry, "closed")
        while self._queue:
            self._answer(self._queue.popleft(), _closing())
        self._admit()
        if not self._is_drained:
            await self._drained.wait()
        self._threads.shutdown(wait=False)

    def _take(self, key: str) -> Entry[S]:
        """Joins the entry of `key`, or starts one. Raises before anything has changed."""
        if self._closed:
            raise _closing()
        entry = self._entries.get(key)
        if entry is None or entry.state != "resident":
            self._check_cold(key)
        if entry is None:
            entry = Entry(key, self._clock())
            self._entries[key] = entry
            self._alive[entry] = None
            entry.task = asyncio.get_running_loop().create_task(self._bring(entry))
        entry.leases += 1
        self._note_asked(entry)
        return entry

    def _note_asked(self, entry: Entry[S]) -> None:
        if 0 < entry.num_bytes <= self.budget_bytes:  # it is prepared, and not too large for any pool like this one
            self._working_set.note(entry.key, entry.num_bytes)

    def _check_cold(self, key: str) -> None:
        self._failures.check(key)
        self._watchdog.check(key)
        if self._num_waiting >= self._max_waiting:
            num_loads = sum(entry.state != "resident" for entry in self._alive)
            raise Overloaded(
                f"{self._num_waiting} requests are already waiting for models to be loaded; try again shortly.",
                retry_after_s=max(1.0, math.ceil(num_loads / self._max_parallel_loads) * self._typical_load_s),
            )

    async def _settle(self, entry: Entry[S], timeout_s: float | None) -> Tier:
        """Waits for the load, which goes on when this wait is cancelled. Raises what made the load fail."""
        self._num_waiting += 1
        try:
            async with asyncio.timeout(timeout_s):
                await entry.settled.wait()
        except TimeoutError:
            raise DeadlineExceeded(
                f"Model {entry.key!r} was not in memory after {timeout_s:g} s ({entry.state}); try again.",
                param="model",
            ) from None
        finally:
            self._num_waiting -= 1
        if entry.failure is not None:
            raise copy.copy(entry.failure)  # each waiter its own: a shared one would grow everybody's traceback
        return entry.tier

    def _give_back(self, entry: Entry[S]) -> None:
        entry.leases -= 1
        entry.touched_at = self._clock()
        self._note_asked(entry)
        self._let_go(entry)
        self._admit()

    # --- One entry's story --------------------------------------------------------------------------------

    async def _bring(self, entry: Entry[S]) -> None:
        """Loads one model, as a task of its own. The one broad catch: every waiter must get its answer."""
        try:
            async with self._prepare_turns:
                if self._closed:
                    raise _closing()
                entry.state = "preparing"
                prepared = await self._watchdog.call(entry.key, self._loader.prepare, entry.key)
            await self._get_room(entry, prepared)
            async with self._load_turns:
                entry.slot = await self._load(entry, prepared)
        except (Exception, asyncio.CancelledError) as error:
            if entry.state != "gone":  # else it was dropped, and nobody waits
                self._fail(entry, error)
        else:
            self._welcome(entry)
        self._admit()

    async def _load(self, entry: Entry[S], prepared: Prepared[P]) -> S:
        def put_away(slot: S | None) -> None:
            self._put_away(entry, slot)

        for is_last in (False, True):
            try:
                return await self._watchdog.call(entry.key, self._loader.load, prepared, when_late=put_away)
            except OutOfMemory:
                if is_last:
                    raise
                log.warning("load_out_of_memory", model=entry.key, bytes=entry.num_bytes)
            await self.relieve()
        raise AssertionError("the last try returns or raises")

    async def _get_room(self, entry: Entry[S], prepared: Prepared[P]) -> None:
        entry.num_bytes, entry.tier = prepared.num_bytes, prepared.tier
        if (misfit := _closing() if self._closed else self._misfit(entry)) is not None:
            raise misfit
        self._note_asked(entry)
        entry.state = "waiting"
        entry.waiting_at = self._clock()
        entry.room = asyncio.get_running_loop().create_future()
        self._queue.append(entry)
        self._let_go(entry)
        self._admit()
        await entry.room

    def _welcome(self, entry: Entry[S]) -> None:
        entry.state = "resident"
        entry.loaded_at = entry.touched_at = self._clock()
        load_s = entry.loaded_at - entry.asked_at
        self._typical_load_s += 0.2 * (load_s - self._typical_load_s)
        entry.settled.set()
        self._emit(Loaded(entry.key, entry.num_bytes, entry.tier, load_s))
        self._let_go(entry)

    def _fail(self, entry: Entry[S], error: BaseException) -> None:
        """Tells all who wait; the reason is remembered when it is a fact about the model."""
        if isinstance(error, RookeryError):
            log.info("load_failed", model=entry.key, state=entry.state, code=error.code, reason=error.message)
        else:
            log.error("load_failed", model=entry.key, state=entry.state, exc_info=error)
        if not isinstance(error, RookeryError):
            error = RookeryError(f"Model {entry.key!r} could not be loaded: {type(error).__name__}.", param="model")
        entry.failure = copy.copy(error)  # without the traceback, which would keep the loader's frames alive
        if isinstance(error, FACTS) and not entry.retired:
            self._failures.remember(entry.key, entry.failure, self._negative_ttl_s)
        if isinstance(error, Hung) and entry.state == "loading":
            self._close_entry(entry, "hung")
        else:
            self._remove(entry)
        entry.settled.set()
        self._emit(LoadFailed(entry.key, error.code))

    def _put_away(self, entry: Entry[S], slot: S | None) -> None:
        """A load that was let go of has ended after all: what it brought goes, and its bytes are free."""
        if slot is None:
            self._remove(entry)
        else:
            entry.slot, entry.state, entry.retired = slot, "resident", "late"
            entry.loaded_at = self._clock()
            self._let_go(entry)
        self._admit()

    def _retire(self, entry: Entry[S], reason: EvictionReason) -> None:
        """Closes the entry to new leases; it goes with its last one, or now."""
        del self._entries[entry.key]
        entry.retired = reason
        entry.pinned = False
        self._let_go(entry)

    async def _retire_all(self, entries: list[Entry[S]], reason: EvictionReason) -> None:
        """Returns when those that nobody leases are unloaded."""
        for entry in entries:
            self._retire(entry, reason)
        self._admit()
        if unloads := [entry.task for entry in entries if entry.state == "unloading" and entry.task]:
            await asyncio.wait(unloads)

    def _let_go(self, entry: Entry[S]) -> None:
        """What becomes of an entry that nobody leases or waits for. Once a thread has begun a load, it goes on.

        1. Merely queued for a turn, or for room behind others: dropped. `_admit` looks after the first in line.
        2. Resident and retired: unloaded.
        3. Else it stays, or becomes, resident.
        """
        if entry.leases:
            return
        behind = entry in self._queue and (entry.retired is not None or entry is not self._queue[0])
        if entry.state == "queued" or behind:
            self._drop(entry)
        elif entry.state == "resident" and entry.retired:
            entry.state = "unloading"
            entry.task = asyncio.get_running_loop().create_task(self._unload(entry, entry.retired))

    def _drop(self, entry: Entry[S]) -> None:
        assert entry.task is not None and not entry.leases
        entry.task.cancel()
        self._remove(entry)

    async def _unload(self, entry: Entry[S], reason: EvictionReason) -> None:
        assert entry.slot is not None and not entry.leases
        try:
            await asyncio.get_running_loop().run_in_executor(self._threads, self._loader.unload, entry.slot)
        except Exception:  # the loader's own fault; counting its bytes for ever would only spread the damage
            log.exception("unload_failed", model=entry.key)
        entry.slot = None
        self._remove(entry)
        self._emit(Evicted(entry.key, entry.num_bytes, reason, self._clock() - entry.loaded_at))
        self._admit()

    def _remove(self, entry: Entry[S]) -> None:
        del self._alive[entry]
        self._close_entry(entry, "gone")

    def _close_entry(self, entry: Entry[S], state: State) -> None:
        entry.state = state
        if self._entries.get(entry.key) is entry:
            del self._entries[entry.key]
        if entry in self._queue:
            self._queue.remove(entry)
        if self._closed and self._is_drained:
            self._drained.set()

    @property
    def _is_drained(self) -> bool:
        return all(entry.state == "hung" for entry in self._alive)

    # --- Room ---------------------------------------------------------------------------------------------

    def _admit(self) -> None:
        """Decides for the first in line for room, then for the next. To be called after every change.

        1. It can never fit beside the pinned models: it fails.
        2. It fits in what is free: the bytes are its own from here on.
        3. It fits once those that are leaving, and idle ones now sent after them, are gone: each comes back here.
        4. It must wait for leases to end, and so must those behind it. When nobody waits for it, it is dropped.
        """
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        while self._queue:
            first = self._queue[0]
            if (misfit := self._misfit(first)) is not None:
                self._answer(self._queue.popleft(), misfit)
            elif first.num_bytes <= self.budget_bytes - self.used_bytes:
                self._answer(self._queue.popleft(), None)
            elif (victims := self._find_victims(first)) is not None:
                for victim in victims:
                    self._retire(victim, "budget")
                return
            elif first.leases:
                return
            else:
                self._drop(first)

    def _answer(self, entry: Entry[S], refusal: RookeryError | None) -> None:
        assert entry.room is not None
        if refusal is None:
            entry.state = "loading"
            entry.room.set_result(None)
        else:
            entry.room.set_exception(refusal)

    def _misfit(self, entry: Entry[S]) -> RookeryError | None:
        if entry.num_bytes > self.budget_bytes:
            return ModelTooLarge(
                f"Model {entry.key!r} needs {_mib(entry.num_bytes)}; the memory budget is {_mib(self.budget_bytes)}.",
                param="model",
            )
        if entry.num_bytes > self.budget_bytes - self.pinned_bytes:
            return Overloaded(
                f"Model {entry.key!r} needs {_mib(entry.num_bytes)}; pinned models take {_mib(self.pinned_bytes)} of "
                f"the memory budget of {_mib(self.budget_bytes)}. Try again when one is unpinned.",
                param="model",
                retry_after_s=60.0,
            )
        return None

    def _find_victims(self, first: Entry[S]) -> list[Entry[S]] | None:
        """As `Victims.find`; arms the timer when the answer can change with time alone."""
        victims, changes_in_s = self._victims.find(first, self._alive, self.budget_bytes, self._clock())
        if changes_in_s is not None:
            self._timer = asyncio.get_running_loop().call_later(changes_in_s, self._admit)
        return victims

    # --- The outside --------------------------------------------------------------------------------------

    def _emit(self, event: PoolEvent) -> None:
        match event:
            case Loaded(key, num_bytes, tier, load_s):
                log.info("model_loaded", model=key, bytes=num_bytes, tier=tier, duration_ms=ms(load_s))
            case Evicted(key, num_bytes, reason):
                log.info("model_evicted", model=key, bytes=num_bytes, reason=reason)
        if self._on_event is not None:
            try:
                self._on_event(event)
            except Exception:  # an observer must not hurt what it observes
                log.exception("pool_observer_failed", kind=type(event).__name__)


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:,.1f} MiB"


def _closing() -> Overloaded:
    return Overloaded("This replica is shutting down; try again.", retry_after_s=1.0)
