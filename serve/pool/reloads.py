"""Which loads bring back what was evicted a short while before: many of them mean too little memory."""

from __future__ import annotations

import time
from collections.abc import Callable

SOON_S = 600.0
MAX_REMEMBERED = 4096  # keys come from outside, so their number is not ours


class Reloads:
    """Remembers the last `MAX_REMEMBERED` evictions."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._evicted: dict[str, float] = {}  # when, the oldest first

    def note(self, key: str) -> None:
        """The model of `key` was evicted."""
        self._evicted.pop(key, None)
        self._evicted[key] = self._clock()
        if len(self._evicted) > MAX_REMEMBERED:
            del self._evicted[next(iter(self._evicted))]

    def take(self, key: str) -> bool:
        """Whether a load of `key` now is a reload; its eviction is forgotten with that."""
        evicted_at = self._evicted.pop(key, None)
        return evicted_at is not None and self._clock() - evicted_at <= SOON_S
