"""Who has been served how much: virtual token counters.

Knows names and numbers only. Source: Sheng et al., "Fairness in Serving Large Language Models" (OSDI 2024).
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)

MEMORY = 1024.0  # tokens of a lead that are remembered: having been served less gives no right to starve others later


class TokenCounters(Generic[K]):
    """Tokens of each name that has work. Who comes from idle starts where the least served is, and no lower."""

    def __init__(self) -> None:
        self._served: dict[K, float] = {}
        self._members: dict[K, int] = {}
        self._floor = 0.0  # what the least served has had
        self._is_floor_known = True

    def __len__(self) -> int:
        return len(self._served)

    def members(self, name: K) -> int:
        """How many pieces of work `name` has."""
        return self._members.get(name, 0)

    def served(self, name: K) -> float:
        """Its tokens; for who is idle, those that it would start with."""
        return self._served[name] if name in self._served else self._least()

    def enter(self, name: K) -> None:
        """`name` has one more piece of work."""
        self._served[name] = self.served(name)
        self._is_floor_known = False
        self._members[name] = self.members(name) + 1

    def leave(self, name: K) -> None:
        """One piece less; with the last one its counter is forgotten."""
        self._members[name] -= 1
        if not self._members[name]:
            del self._members[name], self._served[name]
            self._is_floor_known = False

    def charge(self, tokens: Mapping[K, float]) -> None:
        """Count what each name was served, together: the least is looked for once."""
        limit = self._least() + MEMORY
        for name, count in tokens.items():
            self._served[name] = min(self._served[name] + count, limit)
        self._is_floor_known = False

    def _least(self) -> float:
        if not self._is_floor_known:
            self._floor, self._is_floor_known = min(self._served.values(), default=0.0), True
        return self._floor
