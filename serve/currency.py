"""Drops from memory what is nobody's newest revision any more: no step of a publication tells a replica anything."""

from __future__ import annotations

import asyncio
from typing import Any

from serve.errors import ModelNotFound, RookeryError
from serve.logs import get_logger
from serve.pool.pool import ModelPool
from serve.store.revisions import Store

log = get_logger()

LOOK_S = 4.0


async def keep_current(pool: ModelPool[Any, Any], store: Store, every_s: float = LOOK_S) -> None:
    """Until it is cancelled. Who asks for an old revision by name still gets it: it goes when idle, and comes again."""
    while True:
        await asyncio.sleep(every_s)
        try:
            idle = [model.key for model in pool.residents() if not model.leases and not model.leaving]
            old = await asyncio.to_thread(_replaced, store, idle)
            if old:
                await pool.forget(old.__contains__)
        except Exception:  # whatever it was, what is deleted must go
            log.exception("old_revisions_not_dropped")


def _replaced(store: Store, keys: list[str]) -> set[str]:
    return {key for key in keys if _is_replaced(store, *key.split("@"))}


def _is_replaced(store: Store, model_id: str, revision: str) -> bool:
    try:
        return store.locate(model_id).revision != revision
    except ModelNotFound:
        return True
    except RookeryError:  # the disk cannot tell now
        return False
