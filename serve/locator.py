"""Where a model is: on this disk, or else on the Hub, asked once however many wait."""

from __future__ import annotations

import asyncio
import time
from concurrent.futures import ThreadPoolExecutor

from serve.errors import HubUnreachable, ModelNotFound, Overloaded, RookeryError
from serve.store.hub import Hub
from serve.store.revisions import Revision, Store

NEGATIVE_TTL_S = 60.0  # how long the Hub's "no such model" is believed
UNREACHABLE_TTL_S = 10.0  # and how long, that it cannot be reached
MAX_MISSING = 10_000
PARALLEL_FETCHES = 4  # a line is seldom faster with more
MAX_FETCHES = 64


class Locator:
    """Finds revisions for one event loop. The Hub has threads of its own: a slow one must not hold up what is here."""

    def __init__(self, store: Store, hub: Hub) -> None:
        self._store, self._hub = store, hub
        self._threads = ThreadPoolExecutor(PARALLEL_FETCHES, thread_name_prefix="hub")
        self._fetches: dict[str, asyncio.Future[Revision]] = {}
        self._missing: dict[str, tuple[float, RookeryError]] = {}  # id -> (believed until, reason)

    async def locate(self, model_id: str) -> tuple[Revision, float]:
        """The model's newest revision, and the seconds it took to fetch it from the Hub (0: it was here).

        Raises: ModelNotFound, ModelGated, ModelUnusable, StoreUnavailable, Overloaded.
        """
        try:
            return await asyncio.to_thread(self._store.resolve, model_id), 0.0
        except ModelNotFound:
            if not self._hub.enabled:
                raise
        started = time.monotonic()
        believed_until, reason = self._missing.get(model_id, (0.0, None))
        if reason is not None and started < believed_until:
            raise type(reason)(reason.message, param=reason.param)
        if model_id not in self._fetches:
            self._begin(model_id)
        return await asyncio.shield(self._fetches[model_id]), time.monotonic() - started

    def forget(self, model_id: str) -> None:
        """Ask the Hub again at the next request."""
        wanted = model_id.lower()
        self._missing = {name: entry for name, entry in self._missing.items() if name.lower() != wanted}

    def close(self) -> None:
        """Begin no more fetches; those under way end by their own deadlines."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _begin(self, model_id: str) -> None:
        if len(self._fetches) >= MAX_FETCHES:
            raise Overloaded("Too many models are being fetched from the Hub; try again soon.", retry_after_s=10)
        # NOTE: a fetch belongs to nobody in particular: a caller who leaves does not stop it for the others.
        fetch = asyncio.get_running_loop().run_in_executor(self._threads, self._fetch, model_id)
        self._fetches[model_id] = fetch
        fetch.add_done_callback(lambda done: self._end(model_id, done))

    def _fetch(self, model_id: str) -> Revision:
        try:
            return self._hub.locate(model_id)
        except HubUnreachable as exc:
            # Without a Hub this disk is all there is, and a name that is not on it is unknown.
            raise ModelNotFound(
                f"Model {model_id!r} is not here, and the Hub that might have it cannot be reached.", param="model"
            ) from exc

    def _end(self, model_id: str, fetch: asyncio.Future[Revision]) -> None:
        del self._fetches[model_id]
        error = None if fetch.cancelled() else fetch.exception()
        if isinstance(error, RookeryError) and error.retry_after_s is None:
            now = time.monotonic()
            kept = list(self._missing.items())[-MAX_MISSING:]
            self._missing = {name: entry for name, entry in kept if entry[0] > now}
            ttl_s = UNREACHABLE_TTL_S if isinstance(error.__cause__, HubUnreachable) else NEGATIVE_TTL_S
            self._missing[model_id] = (now + ttl_s, error)
