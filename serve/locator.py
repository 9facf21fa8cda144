"""Where a model is: on this disk, or else on the Hub, asked once however many wait."""

from __future__ import annotations

import asyncio
import copy
import time
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from serve.errors import (
    DiskFull,
    HubUnreachable,
    ModelGated,
    ModelNotFound,
    ModelUnusable,
    Overloaded,
    RookeryError,
    StoreUnavailable,
)
from serve.hub.fetch import Hub
from serve.metrics import Metrics
from serve.store.marks import DAMAGED, is_marked
from serve.store.revisions import Revision, Store
from serve.types import ALL_SEEING, ModelId, Viewer

NEGATIVE_TTL_S = 60.0  # how long the Hub's "no such model" is believed
UNREACHABLE_TTL_S = 10.0  # and how long, that it cannot be reached
MAX_MISSING = 10_000
MAX_FETCHES = 64
_PARALLEL_LOOKS = 16  # at the disk

_OUTCOMES: dict[type[BaseException], str] = {
    ModelNotFound: "not_found",
    ModelGated: "gated",
    ModelUnusable: "unusable",
    HubUnreachable: "unreachable",
    DiskFull: "disk_full",
    StoreUnavailable: "unavailable",
}


class _Wanted(NamedTuple):
    """What one fetch is for: strangers do not learn what others' fetches find."""

    model_id: str  # in lower case
    revision: str | None
    viewer: Viewer


class Locator:
    """Finds revisions for one event loop. The Hub has threads of its own: a slow one must not hold up what is here."""

    def __init__(self, store: Store, hub: Hub, metrics: Metrics | None = None) -> None:
        self._store, self._hub = store, hub
        self._metrics = metrics or Metrics(enabled=False)
        # Look-ups of what is not here may take their time: others' work must not wait behind them.
        self._looking = ThreadPoolExecutor(_PARALLEL_LOOKS, thread_name_prefix="locate")
        # One for each: most of them wait, and the Hub's "no such model" must not queue behind downloads.
        self._threads = ThreadPoolExecutor(MAX_FETCHES, thread_name_prefix="hub")
        self._fetches: dict[_Wanted, asyncio.Future[Revision]] = {}
        self._missing: dict[_Wanted, tuple[float, RookeryError]] = {}  # believed until, reason

    async def locate(self, model_id: str, *, viewer: Viewer = ALL_SEEING) -> tuple[Revision, float]:
        """The model's newest revision, and the seconds it took to fetch it from the Hub (0: it was here).

        What the viewer may not see is not there. Raises: ModelNotFound, ModelGated, ModelUnusable,
        HubUnreachable, DiskFull, StoreUnavailable, Overloaded.
        """
        wanted = ModelId.parse(model_id)  # an impossible id is nobody's: not worth a question
        look = asyncio.get_running_loop().run_in_executor(self._looking, self._find_here, model_id, viewer)
        if found := await look:
            return found, 0.0
        started = time.monotonic()
        key = _Wanted(str(wanted).lower(), wanted.revision, viewer)
        believed_until, reason = self._missing.get(key, (0.0, None))
        if reason is not None and started < believed_until:
            raise copy.copy(reason)
        if key not in self._fetches:
            self._begin(key, model_id)
        try:
            return await asyncio.shield(self._fetches[key]), time.monotonic() - started
        except RookeryError as exc:
            raise copy.copy(exc) from exc  # each who waits has an error of its own

    async def forget(self, model_id: str) -> None:
        """Ask the Hub again at the next request."""
        wanted = model_id.lower()
        self._missing = {key: entry for key, entry in self._missing.items() if key.model_id != wanted}
        await asyncio.to_thread(self._hub.forget, wanted)

    def close(self) -> None:
        """Begin no more fetches, and end those under way: another process may go on with them."""
        self._hub.close()
        for threads in (self._looking, self._threads):
            threads.shutdown(wait=False, cancel_futures=True)

    def _find_here(self, model_id: str, viewer: Viewer) -> Revision | None:
        """None: the Hub is to be asked. Raises: ModelNotFound where it is not.

        Nothing is converted here. What a stranger may not know of is asked for like what is not here.
        """
        try:
            found = self._store.locate(model_id, viewer)
        except ModelNotFound as exc:
            if self._hub.enabled:
                return None
            if viewer.sees_all:
                raise
            raise self._hub.no_such_model(model_id) from exc
        if is_marked(found.path, DAMAGED):
            if self._hub.enabled and self._store.is_to_be_fetched(found):
                return None
            self._store.resolve(model_id)  # says so
        self._store.check_use(found)
        self._hub.touch(found)
        return found

    def _begin(self, key: _Wanted, model_id: str) -> None:
        if len(self._fetches) >= MAX_FETCHES:
            raise Overloaded("Too many models are being fetched from the Hub; try again soon.", retry_after_s=10)
        # NOTE: a fetch belongs to nobody in particular: a caller who leaves does not stop it for the others.
        started = time.monotonic()
        fetch = asyncio.get_running_loop().run_in_executor(self._threads, self._fetch, model_id, key.viewer)
        self._fetches[key] = fetch
        fetch.add_done_callback(lambda done: self._end(key, done, time.monotonic() - started))

    def _fetch(self, model_id: str, viewer: Viewer) -> Revision:
        try:
            return self._hub.locate(model_id, viewer=viewer)
        except HubUnreachable as exc:
            if not self._hub.is_offline:
                raise
            # Without a Hub this disk is all there is, and a name that is not on it is unknown.
            if not viewer.sees_all:
                raise self._hub.no_such_model(model_id) from exc
            raise ModelNotFound(
                f"Model {model_id!r} is not here, and the Hub that might have it cannot be reached.", param="model"
            ) from exc

    def _end(self, key: _Wanted, fetch: asyncio.Future[Revision], duration_s: float) -> None:
        del self._fetches[key]
        error = None if fetch.cancelled() else fetch.exception()
        outcome = "ok" if error is None else _OUTCOMES.get(type(error), "error")
        self._metrics.hub_fetch_duration.labels(outcome).observe(duration_s)
        if isinstance(error, RookeryError) and error.retry_after_s is None:
            now = time.monotonic()
            kept = list(self._missing.items())[-MAX_MISSING:]
            self._missing = {other: entry for other, entry in kept if entry[0] > now}
            ttl_s = UNREACHABLE_TTL_S if isinstance(error.__cause__, HubUnreachable) else NEGATIVE_TTL_S
            self._missing[key] = (now + ttl_s, copy.copy(error))
