"""What the pool and its surroundings say to each other: how a model is loaded, leased, listed and reported.

Plain values and one protocol; the pool itself is `serve.pool.pool`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, Literal, Protocol, TypeVar

from serve.types import Tier

P = TypeVar("P")  # what `prepare` hands to `load`: a mapped file, say
S = TypeVar("S")  # what a lease gives access to: a place on a device

# late: its load was let go of, and ended after all; memory: the system had none; refused: it does not work
EvictionReason = Literal["budget", "forgotten", "closed", "late", "memory", "refused"]


@dataclass(frozen=True, slots=True)
class Prepared(Generic[P]):
    """A model that is known to exist and to be valid. Nothing of it is on the device yet."""

    num_bytes: int  # what it will take of the budget, from the start of `load` to the end of `unload`
    tier: Tier  # where its weights came from: host, disk or hub
    payload: P


class Loader(Protocol[P, S]):
    """Brings models in and out. Every method blocks, and is called on a thread of the pool's."""

    def prepare(self, key: str) -> Prepared[P]:
        """May download. Raises: ModelNotFound, ModelGated, ModelUnusable, StoreUnavailable, ..."""
        ...

    def load(self, prepared: Prepared[P]) -> S:
        """Takes memory and fills it; leaves nothing behind when it raises. Raises: OutOfMemory, ..."""
        ...

    def unload(self, slot: S) -> None:
        """Quick; called once a slot, when nobody leases it."""
        ...


@dataclass(frozen=True, slots=True)
class Lease(Generic[S]):
    """The right to use `slot`, which stays as it is until the lease ends."""

    key: str
    slot: S
    tier: Tier  # "device" when it was resident, else where it came from
    load_s: float  # how long this lease waited for it; 0 when it was resident


@dataclass(frozen=True, slots=True)
class ResidentModel:
    """One model in memory. `tier`: where it came from; `leaving`: closed to new leases, goes with its last one."""

    key: str
    num_bytes: int
    tier: Tier
    leases: int
    idle_s: float
    pinned: bool
    leaving: bool


@dataclass(frozen=True, slots=True)
class Loaded:
    """A model became resident, `load_s` after it was first asked for (queues included)."""

    key: str
    num_bytes: int
    tier: Tier
    load_s: float


@dataclass(frozen=True, slots=True)
class Evicted:
    """A model's bytes are free again, `age_s` after it became resident."""

    key: str
    num_bytes: int
    reason: EvictionReason
    age_s: float


@dataclass(frozen=True, slots=True)
class LoadFailed:
    """A model did not become resident; `code` is that of the RookeryError its waiters got."""

    key: str
    code: str


PoolEvent = Loaded | Evicted | LoadFailed
