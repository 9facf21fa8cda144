"""Whether the generator can really write text, asked no more often than needed."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable

from serve.errors import RookeryError, StoreUnavailable

_READY_FOR_S = 5.0


class Readiness:
    """The generator's own check, one at a time and remembered for a few seconds when it was good.

    The check goes on when a probe gives up, so a cold start longer than the probe's patience still ends.
    """

    def __init__(self, check: Callable[[], Awaitable[None]], patience_s: float) -> None:
        self._check = check
        self._patience_s = patience_s
        self._running: asyncio.Task[None] | None = None
        self._good_until = 0.0

    async def wait(self, patience_s: float | None = None) -> None:
        """Raises: RookeryError when the generator is not ready, or does not say so in time."""
        if time.monotonic() < self._good_until:
            return
        if self._running is None or self._running.done():
            self._running = asyncio.create_task(self._run())
        try:
            await asyncio.wait_for(asyncio.shield(self._running), patience_s or self._patience_s)
        except TimeoutError as exc:
            raise StoreUnavailable("Not ready yet: the base model is still being loaded.", retry_after_s=2) from exc

    async def is_good(self, patience_s: float) -> bool:
        """Whether the generator is ready, as far as it says so in time."""
        try:
            await self.wait(patience_s)
        except RookeryError:
            return False
        return True

    async def _run(self) -> None:
        await self._check()
        self._good_until = time.monotonic() + _READY_FOR_S
