"""Circuit breakers: a host that keeps failing is left alone for a while, and everybody is told at once.

closed -> open after some failures in a row -> half-open when the pause is over: one caller probes -> closed, or open
again for twice as long. A failure that may lie in what was asked for, and not in the host, counts once for each such
thing. Knows nothing of HTTP: callers report what became of their requests.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from urllib.parse import urlsplit

from serve.errors import StoreUnavailable
from serve.logs import get_logger

log = get_logger()

FAILURES = 5  # in a row; more than the tries of one call
PAUSE_S = 5.0
MAX_PAUSE_S = 60.0  # also of those the host asks for: one answer in error must not lock all out for long
PROBE_S = 30.0  # a probe that has reported nothing for so long is thought lost


class Breaker:
    """The memory of one host's failures. Safe to use from many threads.

    Whoever passes `check` reports one of `succeeded`, `failed` and `released` (no verdict), from the same thread; and
    `answered` before that, where success will take a while.
    """

    def __init__(
        self,
        host: str,
        *,
        failures: int = FAILURES,
        pause_s: float = PAUSE_S,
        max_pause_s: float = MAX_PAUSE_S,
        clock: Callable[[], float] = time.monotonic,
        jitter: Callable[[], float] = random.random,
        caller: Callable[[], int] = threading.get_ident,
    ) -> None:
        self.host = host
        self._limit = failures
        self._first_pause_s, self._max_pause_s = pause_s, max_pause_s
        self._clock, self._jitter, self._caller = clock, jitter, caller
        self._lock = threading.Lock()
        self._num_failures = 0  # in a row, of the host
        self._suspects: set[str] = set()  # in the same row: things that failed, or the host when asked for them
        self._kind: type[StoreUnavailable] = StoreUnavailable  # of the last failure
        self._pause_s = pause_s
        self._open_until: float | None = None
        self._prober: int | None = None  # the thread whose request is the probe
        self._probe_until = 0.0

    def __repr__(self) -> str:
        return f"Breaker({self.host!r}, {self.state}, {self._count} failures)"

    @property
    def state(self) -> str:
        """`closed`, `open`, or `half-open` from when a probe may be sent until its verdict is known."""
        if self._open_until is None:
            return "closed"
        return "half-open" if self._prober or self._clock() >= self._open_until else "open"

    def check(self) -> None:
        """Lets the caller through. Raises: the kind of the last failure, while the host is left alone."""
        with self._lock:
            if self._open_until is None:
                return
            now = self._clock()
            left_s = (self._probe_until if self._prober else self._open_until) - now
            if left_s <= 0:
                self._prober, self._probe_until = self._caller(), now + PROBE_S
                return
            if self._prober:  # its verdict is near: nobody need wait for as long as a lost one is waited for
                left_s = min(left_s, self._first_pause_s)
            kind, failures = self._kind, self._count
        raise kind(
            f"The Hub at {self.host} fails (times in a row: {failures}) and is left alone for {left_s:.0f} s; "
            "try again then.",
            retry_after_s=left_s,
        )

    def answered(self) -> None:
        """The host has begun to answer as it should: nobody need wait for the end, if this is the probe."""
        with self._lock:
            if self._open_until is not None and not self._is_late():
                self._close()

    def succeeded(self) -> None:
        """The host has answered as it should."""
        with self._lock:
            if not self._is_late():
                self._close()

    def failed(self, exc: StoreUnavailable, *, about: str | None = None, asked_s: float = 0.0) -> None:
        """The host has failed; or it may be the fault of what was asked for, if `about` names that.

        `asked_s`: how long the host asked to be left alone. Pauses shorter than our own bind only whom it told.
        """
        with self._lock:
            asked_s = min(asked_s, self._max_pause_s) if about is None and asked_s >= self._first_pause_s else 0.0
            if self._is_late():
                self._open_until = max(self._open_until or 0.0, self._clock() + asked_s)
                return
            was_probe, self._prober = self._prober is not None, None
            if about in self._suspects:  # nothing new: where it was the probe, the next caller may try
                return
            self._kind = type(exc)
            self._add(about)
            if was_probe:
                self._pause_s = min(2 * self._pause_s, self._max_pause_s)
            if was_probe or self._count >= self._limit:
                self._open(max(asked_s, min(self._pause_s * (1 + self._jitter() / 4), self._max_pause_s)))
            elif asked_s:
                self._open(asked_s)

    def released(self) -> None:
        """Nothing was learned of the host: the next caller may probe."""
        with self._lock:
            if not self._is_late():
                self._prober = None

    def _is_late(self) -> bool:
        """Whether this caller was let through before the breaker opened: what opened it is newer."""
        return self._open_until is not None and self._prober != self._caller()

    @property
    def _count(self) -> int:
        return self._num_failures + len(self._suspects)

    def _add(self, about: str | None) -> None:
        if about is None:
            self._num_failures += 1
        else:
            self._suspects.add(about)

    def _open(self, pause_s: float) -> None:
        self._open_until = self._clock() + pause_s
        log.warning("hub_breaker_opened", host=self.host, failures=self._count, pause_s=round(pause_s, 1))

    def _close(self) -> None:
        if self._open_until is not None:
            log.info("hub_breaker_closed", host=self.host)
        self._num_failures, self._pause_s = 0, self._first_pause_s
        self._suspects.clear()
        self._open_until = self._prober = None


class Breakers:
    """One breaker for each (scheme, host, port)."""

    def __init__(self, new: Callable[[str], Breaker] = Breaker) -> None:
        self._new = new
        self._lock = threading.Lock()
        self._by_host: dict[str, Breaker] = {}

    def of(self, url: str) -> Breaker:
        """The breaker of the host that `url` names."""
        parts = urlsplit(url)
        port = parts.port or {"http": 80, "https": 443}.get(parts.scheme)
        host = f"{parts.scheme}://{parts.hostname}:{port}"
        with self._lock:
            if host not in self._by_host:
                self._by_host[host] = self._new(host)
            return self._by_host[host]


BREAKERS = Breakers()  # of this process
