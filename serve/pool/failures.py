"""Loads that failed, remembered for a while: asking again soon gives the same answer, at no cost."""

from __future__ import annotations

import copy
from collections.abc import Callable

from serve.errors import ModelGated, ModelNotFound, ModelTooLarge, ModelUnusable, RookeryError

# Facts about a model. All other failures may pass, and are not remembered.
FACTS = (ModelNotFound, ModelGated, ModelUnusable, ModelTooLarge)
MAX_REMEMBERED = 4096  # keys come from outside, so their number is not ours


class Failures:
    """What to say of a key without trying. Times are `clock`'s, in seconds."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._by_key: dict[str, tuple[float, RookeryError]] = {}  # key -> (expires at, reason), oldest first

    def remember(self, key: str, reason: RookeryError, for_s: float) -> None:
        self._by_key.pop(key, None)
        self._by_key[key] = (self._clock() + for_s, reason)
        if len(self._by_key) > MAX_REMEMBERED:
            del self._by_key[next(iter(self._by_key))]

    def check(self, key: str) -> None:
        """Raises: what is remembered of `key`."""
        expires_at, reason = self._by_key.get(key, (0.0, None))
        if reason is not None:
            if self._clock() < expires_at:
                raise copy.copy(reason)
            del self._by_key[key]

    def forget(self, match: Callable[[str], bool]) -> None:
        for key in [key for key in self._by_key if match(key)]:
            del self._by_key[key]
