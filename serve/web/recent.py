"""What was read lately, kept for who looks again soon: a bounded number of values, none for longer than its time.

Knows no page. What people have posted is in such values, so they go by themselves, also where nobody asks any more.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")

KEEP_S = 600.0


class Recent(Generic[K, V]):
    """At most `most` values by their keys, each for `keep_s` after it was put; the oldest go first. For any thread."""

    def __init__(self, most: int, keep_s: float = KEEP_S) -> None:
        self._most, self._keep_s = most, keep_s
        self._lock = threading.Lock()
        self._values: OrderedDict[K, tuple[float, V]] = OrderedDict()  # with when they go, the next one first
        self._timer: threading.Timer | None = None

    def __len__(self) -> int:
        return len(self._values)

    def get(self, key: K) -> V | None:
        with self._lock:
            found = self._values.get(key)
        return found[1] if found else None

    def put(self, key: K, value: V) -> None:
        with self._lock:
            self._values.pop(key, None)
            self._values[key] = (time.monotonic() + self._keep_s, value)
            while len(self._values) > self._most:
                self._values.popitem(last=False)
            if self._timer is None:
                self._sweep_in(self._keep_s)

    def forget(self, is_meant: Callable[[K], bool]) -> None:
        with self._lock:
            for key in [key for key in self._values if is_meant(key)]:
                del self._values[key]

    def _sweep(self) -> None:
        with self._lock:
            self._timer, now = None, time.monotonic()
            while self._values:
                key, (until, _) = next(iter(self._values.items()))
                if until > now:
                    return self._sweep_in(until - now)
                del self._values[key]

    def _sweep_in(self, seconds: float) -> None:
        self._timer = threading.Timer(seconds, self._sweep)
        self._timer.daemon = True  # no reason to outlive the process
        self._timer.start()
