"""What becomes of a revision that the disk has damaged: it leaves all memories, and is fetched anew if it can be."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import Protocol

from serve.errors import RookeryError
from serve.hub.fetch import Hub
from serve.logs import get_logger
from serve.metrics import Metrics
from serve.settings import Settings
from serve.store.lookup import Revision
from serve.store.revisions import Store
from serve.store.scrub import Scrub

log = get_logger()


class Generators(Protocol):
    """All of them, asked at once."""

    def forget(self, model_id: str) -> Awaitable[None]: ...


def scrub_in_background(
    settings: Settings, store: Store, hub: Hub | None, generators: Generators, metrics: Metrics
) -> None:
    """Begins to look through the store, in a thread; to be called in the event loop that asks `generators`."""
    if settings.scrub_hours <= 0:
        return
    loop = asyncio.get_running_loop()

    def replace(found: Revision) -> None:
        metrics.disk_evictions.labels("damaged").inc()
        try:
            asyncio.run_coroutine_threadsafe(_forget(generators, found.model_id), loop).result()
            if hub is not None and store.is_to_be_fetched(found):
                hub.locate(f"{found.model_id}@{found.revision}")
                log.info("revision_replaced", model=found.model_id, revision=found.revision)
        except RookeryError as exc:  # who asks for it next has it fetched
            log.warning("revision_not_replaced", model=found.model_id, revision=found.revision, reason=exc.message)

    Scrub(store, settings.scrub_hours, on_damaged=replace).start()


async def _forget(generators: Generators, model_id: str) -> None:
    await generators.forget(model_id)
