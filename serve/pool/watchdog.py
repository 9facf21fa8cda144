"""Calls that block, and may hang: a disk that stops to answer, a file server that is gone.

A thread that waits for such a thing cannot be ended. It can be let go of: whoever waits for it gets an error in time,
its place is another's, and what it brings after all is put away.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Executor, Future
from typing import Any, TypeVar

from serve.errors import OutOfMemory, StoreUnavailable
from serve.logs import get_logger

log = get_logger()

LIMIT_S = 120.0
MAX_HUNG = 64  # threads; beyond, nothing more is begun
_RETRY_AFTER_S = 10.0

T = TypeVar("T")


class ThreadPerCall(Executor):
    """A thread for each call, which ends with it: one that hangs takes nobody's place, nor holds up the exit.

    It takes 0.1 ms to start; whoever submits bounds their number.
    """

    def submit(self, fn: Callable[..., T], /, *args: Any, **kwargs: Any) -> Future[T]:
        future = Future[T]()

        def run() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                result = fn(*args, **kwargs)
            except BaseException as exc:
                future.set_exception(exc)
            else:
                future.set_result(result)

        try:
            threading.Thread(target=run, name=getattr(fn, "__name__", "call"), daemon=True).start()
        except RuntimeError as exc:  # the system has no memory for its stack, or none of its numbers
            raise OutOfMemory("There is no memory for one more thread now; try again.", retry_after_s=5) from exc
        return future


class Hung(StoreUnavailable):
    """A call has taken too long. Nobody knows whether it will ever end."""


class Watchdog:
    """Lets go of calls that take longer than `limit_s`; while one hangs, no other of its key is begun."""

    def __init__(self, threads: Executor, limit_s: float = LIMIT_S) -> None:
        self.limit_s = limit_s
        self._threads = threads
        self._hung: dict[str, asyncio.Future[Any]] = {}

    @property
    def num_hung(self) -> int:
        return len(self._hung)

    def check(self, key: str) -> None:
        """Raises: StoreUnavailable while a call of `key` hangs, or too many of others do."""
        if key in self._hung or len(self._hung) >= MAX_HUNG:
            raise StoreUnavailable(
                "The files of the model cannot be read now: the disk, or the file server, does not answer.",
                param="model",
                retry_after_s=_RETRY_AFTER_S,
            )

    async def call(
        self, key: str, function: Callable[..., T], *args: object, when_late: Callable[[T | None], None] | None = None
    ) -> T:
        """What `function` returns. Raises: what it raises; Hung, and then `when_late` is told when it ends after all.

        `when_late` gets what was returned, None where it raised.
        """
        future = asyncio.get_running_loop().run_in_executor(self._threads, function, *args)
        await asyncio.wait({future}, timeout=self.limit_s)
        if future.done():
            return future.result()
        log.error("call_hangs", model=key, call=getattr(function, "__name__", ""), limit_s=self.limit_s)
        self._hung[key] = future

        def end(future: asyncio.Future[T]) -> None:
            if self._hung.get(key) is future:
                del self._hung[key]
            failed = future.cancelled() or future.exception() is not None
            log.info("call_ended_late", model=key, ok=not failed)
            if when_late is not None:
                when_late(None if failed else future.result())

        future.add_done_callback(end)
        raise Hung(
            f"The files of model {key!r} could not be read within {self.limit_s:g} s; try again later.",
            param="model",
            retry_after_s=_RETRY_AFTER_S,
        )
