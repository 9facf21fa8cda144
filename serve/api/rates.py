"""How often, counted by the `limits` library: in this process, or in a Redis that several gateways share.

A server that counts elsewhere serves on where that cannot be reached: whoever is over a limit is then let through.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, cast

from limits import RateLimitItemPerSecond
from limits.aio.storage import RedisStorage, Storage
from limits.aio.strategies import MovingWindowRateLimiter
from limits.errors import ConfigurationError, StorageError
from limits.storage import storage_from_string

from serve.logs import get_logger
from serve.settings import PREFIX, BadSetting

log = get_logger()

_PATIENCE_S = 0.5  # with a Redis; a request waits for it
_AWAY_S = 5.0  # after it could not be reached, it is not asked
_BURST_S = 2  # so many seconds' requests may come at once
_MINUTE_S = 60
_KEPT_S = 3 * _MINUTE_S  # a minute's count: for longer than it holds, as clocks of gateways differ


@dataclass(frozen=True, slots=True)
class Count:
    """What came of counting something in. `wait_s`: until there is room for it; 0: it was counted."""

    limit: int
    remaining: int
    reset_s: float  # until all of the limit is free again
    wait_s: float = 0.0
    minute: int = 0  # in which tokens were counted


class Rates:
    """`url`: of a Redis (``redis://…``); "": this process counts. Raises: BadSetting."""

    def __init__(self, url: str = "") -> None:
        try:
            self._storage = _open(url)
        except (ConfigurationError, ValueError) as exc:
            raise BadSetting(f"{PREFIX}LIMITS_URL cannot be used: it looks like 'redis://host:6379/0'.") from exc
        self._requests = MovingWindowRateLimiter(self._storage)
        self._away_until = 0.0

    async def close(self) -> None:
        if isinstance(self._storage, RedisStorage):
            await cast(Any, self._storage.bridge).storage.aclose()  # of either library that it may use

    async def request(self, who: str, per_s: float) -> Count | None:
        """Counts a request in, `per_s` a second and twice that at once. None: it cannot be counted now."""
        window_s = max(_BURST_S, math.ceil(1 / per_s))
        item = RateLimitItemPerSecond(max(1, math.floor(per_s * window_s)), window_s, namespace="requests")

        async def count() -> Count:
            is_free = await self._requests.hit(item, who)
            reset_at, remaining = await self._requests.get_window_stats(item, who)
            wait_s = 0.0 if is_free else max(0.001, reset_at - time.time())
            return Count(item.amount, max(0, remaining), window_s, wait_s)

        return await self._ask(count)

    async def tokens(self, who: str, per_min: int, cost: int) -> Count | None:
        """Counts tokens in where there is room for all of them. None: they cannot be counted now."""

        async def count() -> Count:
            minute = _this_minute()
            await self._add(who, minute, cost)
            window = await self._window(who)
            if window.used <= per_min:
                return _as_count(window, per_min, minute)
            await self._add(who, minute, -cost)
            window = await self._window(who)
            return _as_count(window, per_min, minute, wait_s=max(0.001, window.until(per_min - cost)))

        return await self._ask(count)

    async def correct(self, who: str, per_min: int, more: int, minute: int) -> Count | None:
        """Counts in what is spent, room or not; less than 0 goes back into the `minute` it was taken from."""

        async def count() -> Count:
            this = _this_minute()
            if more > 0 or minute >= this - 1:  # what is older does not hold any more
                await self._add(who, this if more > 0 else minute, more)
            return _as_count(await self._window(who), per_min, minute)

        return await self._ask(count)

    async def _add(self, who: str, minute: int, num_tokens: int) -> None:
        key = _key(who, minute)
        if (count := await self._storage.incr(key, _KEPT_S, num_tokens)) < 0:  # a Redis that has lost what was taken
            await self._storage.incr(key, _KEPT_S, -count)

    async def _window(self, who: str) -> _Window:
        minute, passed_s = divmod(time.time(), _MINUTE_S)
        keys = _key(who, int(minute) - 1), _key(who, int(minute))
        previous, current = [await self._storage.get(key) for key in keys]
        return _Window(previous, current, _MINUTE_S - passed_s)

    async def _ask(self, count: Callable[[], Awaitable[Count]]) -> Count | None:
        if time.monotonic() < self._away_until:
            return None
        try:
            async with asyncio.timeout(_PATIENCE_S):
                return await count()
        except (StorageError, TimeoutError) as exc:
            self._away_until = time.monotonic() + _AWAY_S
            log.warning("limits_not_counted", error=type(exc).__name__, for_s=_AWAY_S)
            return None


@dataclass(frozen=True, slots=True)
class _Window:
    """Two minutes' counts; of the earlier one as much holds as of it is younger than a minute."""

    previous: int
    current: int
    left_s: float  # of the current minute

    @property
    def used(self) -> float:
        return self.previous * self.left_s / _MINUTE_S + self.current

    def until(self, most: int) -> float:
        """Seconds until no more than `most` are used, if nothing is added."""
        if self.used <= most:
            return 0.0
        if self.current <= most:
            return self.left_s - (most - self.current) * _MINUTE_S / self.previous
        return self.left_s + _MINUTE_S * (1 - most / self.current)


def _as_count(window: _Window, limit: int, minute: int, *, wait_s: float = 0.0) -> Count:
    return Count(limit, max(0, limit - math.floor(window.used)), window.until(0), wait_s, minute)


def _this_minute() -> int:
    return int(time.time() // _MINUTE_S)


def _key(who: str, minute: int) -> str:
    return f"tokens/{who}/{minute}"


def _open(url: str) -> Storage:
    options = {"implementation": "redispy"} if url.startswith("redis") else {}
    return cast(Storage, storage_from_string(f"async+{url or 'memory://'}", wrap_exceptions=True, **options))
