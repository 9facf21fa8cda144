"""The pool on real threads."""

from __future__ import annotations

import asyncio
import threading

from serve.errors import (
    ModelNotFound,
)
from serve.pool.loader import Prepared
from serve.pool.pool import ModelPool
from tests.pool.harness import Slot


class ThreadedLoader:
    """Counts bytes on the threads themselves; `gate` holds the loads of the keys in it."""

    def __init__(self, budget_bytes: int) -> None:
        self.budget_bytes = budget_bytes
        self.gates: dict[str, threading.Event] = {}
        self._lock = threading.Lock()
        self.used_bytes = 0
        self.num_loads = 0

    def prepare(self, key: str) -> Prepared[str]:
        if key.startswith("no-"):
            raise ModelNotFound("No.")
        return Prepared(1 + len(key) % 3, "disk", key)

    def load(self, prepared: Prepared[str]) -> Slot:
        with self._lock:
            self.used_bytes += prepared.num_bytes
            self.num_loads += 1
            assert self.used_bytes <= self.budget_bytes
        if gate := self.gates.get(prepared.payload):
            gate.wait()
        return Slot(prepared.payload, prepared.num_bytes)

    def unload(self, slot: Slot) -> None:
        with self._lock:
            assert slot.loaded
            slot.loaded = False
            self.used_bytes -= slot.num_bytes


async def test_on_real_threads_a_hung_load_holds_up_nobody_else() -> None:
    loader = ThreadedLoader(9)
    loader.gates["hangs"] = threading.Event()
    pool: ModelPool[str, Slot] = ModelPool(loader, budget_bytes=9)
    async with pool.lease("ada"):
        hung = asyncio.ensure_future(pool.pin("hangs"))
        async with pool.lease("bob", timeout_s=60) as bob, pool.lease("ada", timeout_s=60) as ada:
            assert (bob.tier, ada.tier) == ("disk", "device")
        assert not hung.done()
    loader.gates["hangs"].set()
    await hung
    await pool.close()
    assert loader.used_bytes == 0


async def test_on_real_threads_a_storm_of_leases_keeps_every_law() -> None:
    """400 leases of 14 models, room for about four: seeded, with cancellations and models that do not exist."""
    loader = ThreadedLoader(8)
    pool: ModelPool[str, Slot] = ModelPool(loader, budget_bytes=8, min_residency_s=0.001, patience_s=0.01)
    keys = ["m" * length for length in range(1, 13)] + ["no-1", "no-2"]
    granted = 0

    async def borrow(number: int) -> None:
        nonlocal granted
        key = keys[(number * number + 3 * number) % len(keys)]
        try:
            async with pool.lease(key) as lease:
                for _ in range(number % 5):
                    await asyncio.sleep(0)
                    assert lease.slot.loaded and lease.slot.key == key
                granted += 1
        except ModelNotFound:
            assert key.startswith("no-")

    tasks = [asyncio.ensure_future(borrow(number)) for number in range(400)]
    await asyncio.sleep(0)
    for task in tasks[::7]:
        task.cancel()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert {type(result) for result in results} == {type(None), asyncio.CancelledError}
    assert granted > 200
    assert pool.num_waiting == 0
    assert all(model.leases == 0 for model in pool.residents())
    await pool.close()
    assert loader.used_bytes == 0
    assert repr(pool) == "<ModelPool [0 of 8 bytes; closed]>"
