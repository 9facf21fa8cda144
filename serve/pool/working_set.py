"""How many bytes of models are in use: those asked for within the last minutes, whether or not they found room.

Not what is in memory: that is never more than the budget, however many models are asked for in turn.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

WINDOW_S = 300.0  # a conversation with a bot pauses for less, and a load after one that was longer is no surprise
MAX_REMEMBERED = 65_536  # keys come from outside, so their number is not ours


@dataclass(frozen=True, slots=True)
class _Asked:
    at: float
    num_bytes: int


class WorkingSet:
    """The distinct models asked for within the last `window_s`, but no more than `MAX_REMEMBERED`."""

    def __init__(self, window_s: float = WINDOW_S, clock: Callable[[], float] = time.monotonic) -> None:
        self.window_s = window_s
        self._clock = clock
        self._asked: dict[str, _Asked] = {}  # the longest ago first
        self._num_bytes = 0

    def note(self, key: str, num_bytes: int) -> None:
        """Somebody asks for the model of `key`, which takes `num_bytes`."""
        self._drop(key)
        self._asked[key] = _Asked(self._clock(), num_bytes)
        self._num_bytes += num_bytes
        if len(self._asked) > MAX_REMEMBERED:
            self._drop(next(iter(self._asked)))

    @property
    def num_bytes(self) -> int:
        """Of all of them together."""
        while self._asked and self._is_past(key := next(iter(self._asked))):
            self._drop(key)
        return self._num_bytes

    def _is_past(self, key: str) -> bool:
        return self._clock() - self._asked[key].at > self.window_s

    def _drop(self, key: str) -> None:
        if (asked := self._asked.pop(key, None)) is not None:
            self._num_bytes -= asked.num_bytes
