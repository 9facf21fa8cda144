"""How long the Hub may take: until all must be over, until something comes, and how fast bytes must come.

Knows nothing of requests.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import httpx2

from serve.errors import StoreUnavailable

CONNECT_S = 5.0  # a Hub that takes longer than this to answer the door is not there
SILENCE_S = 10.0  # silence longer than this is an outage
HEAD_S = 15.0  # name look-up, connection, TLS and the answer's headers together
MIN_BYTES_PER_S = 50_000  # a body slower than this ...
WINDOW_S = 10.0  # ... for so long is an outage too
RETRY_AFTER_S = 30.0  # what we say where the Hub says nothing


@dataclass(frozen=True, slots=True)
class Deadline:
    """When all of something must be over; it runs from its making on."""

    total_s: float
    clock: Callable[[], float] = time.monotonic
    _at: float = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_at", self.clock() + self.total_s)

    def left(self) -> float:
        """Seconds, never less than 0."""
        return max(0.0, self._at - self.clock())

    def check(self) -> None:
        """Raises: StoreUnavailable when the time is up."""
        if not self.left():
            raise StoreUnavailable(
                f"The Hub took longer than {self.total_s:g} s; try again.", retry_after_s=RETRY_AFTER_S
            )

    def timeout(self, silence_s: float = SILENCE_S) -> httpx2.Timeout:
        """How long the next waits may last. Raises: as `check`."""
        self.check()
        left = self.left()
        return httpx2.Timeout(min(left, silence_s), connect=min(left, CONNECT_S))


class Pace:
    """How fast bytes come, over the last `window_s` of waiting for them."""

    def __init__(self, min_bytes_per_s: float, window_s: float) -> None:
        self._min_bytes, self._window_s = min_bytes_per_s * window_s, window_s
        self._waited_s = 0.0
        self._recent: deque[tuple[float, int]] = deque()
        self._num_recent = 0

    def is_too_slow(self, num_bytes: int, waited_s: float) -> bool:
        """Takes in a chunk that was waited for so long."""
        self._waited_s += waited_s
        self._recent.append((self._waited_s, num_bytes))
        self._num_recent += num_bytes
        while self._recent[0][0] <= self._waited_s - self._window_s:
            self._num_recent -= self._recent.popleft()[1]
        return self._waited_s > self._window_s and self._num_recent < self._min_bytes
