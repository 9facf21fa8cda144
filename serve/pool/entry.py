"""What the pool knows of one model, from the first request for it to the end of its unload."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Generic, Literal

from serve.errors import RookeryError
from serve.pool.loader import EvictionReason, S
from serve.types import Tier

State = Literal["queued", "preparing", "waiting", "loading", "hung", "resident", "unloading", "gone"]


@dataclass(eq=False, slots=True)
class Entry(Generic[S]):
    """`leases` counts those that wait for the model, too."""

    key: str
    asked_at: float
    state: State = "queued"
    leases: int = 0
    num_bytes: int = 0  # 0 until prepared
    tier: Tier = "device"
    slot: S | None = None
    used: bool = False  # leased at least once since it became resident
    pinned: bool = False
    retired: EvictionReason | None = None  # closed to new leases: the key is free for a new entry
    failure: RookeryError | None = None
    waiting_at: float = 0.0  # since when it waits for room
    loaded_at: float = 0.0
    touched_at: float = 0.0  # the last start or end of a lease
    task: asyncio.Task[None] | None = None  # of its load, later of its unload
    room: asyncio.Future[None] | None = None
    settled: asyncio.Event = field(default_factory=asyncio.Event)  # resident, or failed

    @property
    def holds_bytes(self) -> bool:
        return self.state in ("loading", "hung", "resident", "unloading")

    def describe(self, now: float) -> str:
        parts = [f"{self.key}: {self.state}"]
        if self.num_bytes:
            parts.append(f"{self.num_bytes} bytes from {self.tier}")
        if self.leases:
            parts.append(f"{self.leases} {'leases' if self.state == 'resident' else 'waiters'}")
        elif self.state == "resident":
            parts.append(f"idle {now - self.touched_at:g} s")
        parts += ["pinned"] * self.pinned + ([self.retired] if self.retired else [])
        return ", ".join(parts)


def total_bytes(entries: Iterable[Entry[Any]]) -> int:
    return sum(entry.num_bytes for entry in entries)
