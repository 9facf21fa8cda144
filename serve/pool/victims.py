"""Who must go when room is short. Looks at entries, and changes none.

Victims are idle and unpinned, the longest idle first, where idle time counts less the more a reload costs
(`RELOAD_COST`). A model that was loaded but not yet leased is spared for `min_residency_s`, unless the first in line
could never fit beside it, or has waited for `patience_s`. When it has, the least recently leased may be closed to new
leases too, and go with their last.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass

from serve.pool.entry import Entry, total_bytes
from serve.pool.loader import S
from serve.types import Tier

# How much slower a model ages for what its reload would cost. From the Hub costs no more than from disk:
# it has been on disk since. A GPT-2 small comes from pinned host memory in about 10 ms, from a file in many times that.
RELOAD_COST: dict[Tier, float] = {"device": 1.0, "host": 1.0, "disk": 4.0, "hub": 4.0}


@dataclass(frozen=True)
class Victims:
    """The rule, with its two times in seconds."""

    min_residency_s: float
    patience_s: float

    def find(
        self, first: Entry[S], alive: Collection[Entry[S]], budget_bytes: int, now: float
    ) -> tuple[list[Entry[S]] | None, float | None]:
        """Whom to retire so that `first` will fit: maybe nobody, if enough are leaving. None: leases must end first.

        With None comes in how many seconds the answer can change with time alone, if it can.
        """
        # Since it came, not since it is first: else each in a line of forty adds its patience to that of all behind it.
        impatient = now - first.waiting_at >= self.patience_s
        residents = [entry for entry in alive if entry.state == "resident"]
        unpinned = [entry for entry in residents if not entry.pinned and not entry.retired]
        leased = [entry for entry in unpinned if entry.leases]
        idle = [entry for entry in unpinned if not entry.leases]
        spared = [e for e in idle if not e.used and now - e.loaded_at < self.min_residency_s]
        # NOTE: the other models' bytes come free when their leases end, so only the pinned and the spared ones can
        # stand in the way for ever: then there is nothing to wait for.
        pinned_bytes = total_bytes(entry for entry in alive if entry.pinned)
        stuck = first.num_bytes > budget_bytes - pinned_bytes - total_bytes(spared)

        missing = first.num_bytes - (budget_bytes - total_bytes(entry for entry in alive if entry.holds_bytes))
        missing -= total_bytes(entry for entry in alive if entry.state == "unloading")
        candidates = _by_age((e for e in idle if e not in spared), now)
        if stuck or impatient:
            candidates += _by_age(spared, now)
        victims = _cover(missing, candidates)
        if victims is None and impatient:
            # Counting those that were closed to new leases before, or each call would close another one.
            missing -= total_bytes(entry for entry in residents if entry.retired)
            victims = _cover(missing, candidates + sorted(leased, key=lambda e: e.touched_at))
        if victims is not None:
            return victims, None
        moments = [entry.loaded_at + self.min_residency_s for entry in spared]
        moments.append(first.waiting_at + self.patience_s)
        return None, min((moment - now for moment in moments if moment > now), default=None)


def _by_age(entries: Iterable[Entry[S]], now: float) -> list[Entry[S]]:
    return sorted(entries, key=lambda e: (now - e.touched_at) / RELOAD_COST[e.tier], reverse=True)


def _cover(missing: int, candidates: list[Entry[S]]) -> list[Entry[S]] | None:
    """The first candidates that have `missing` bytes together, less those not needed after all; None if too few."""
    chosen: list[Entry[S]] = []
    for entry in candidates:
        if missing <= 0:
            break
        chosen.append(entry)
        missing -= entry.num_bytes
    if missing > 0:
        return None
    for entry in reversed(chosen.copy()):
        if missing + entry.num_bytes <= 0:
            chosen.remove(entry)
            missing += entry.num_bytes
    return chosen
