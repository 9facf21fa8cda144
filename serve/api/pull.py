"""Fetching a model from the Hub by hand: POST /v1/models/{id}/pull, and lines of JSON while it comes.

The answer is NDJSON and not server-sent events: `curl -N` shows it as it is, and each line is JSON for `jq`. Lines of
`model.pull` tell how far it is; the last one is the model as GET would give it, or an error in the shape of any other.
Who asks for what is being pulled hears of that pull: who left, or lost the answer, may ask again and again.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import threading
import time
from collections.abc import AsyncIterator, Callable
from typing import Any, NamedTuple

from fastapi import APIRouter, Request
from starlette.responses import Response, StreamingResponse

from serve.api.described import answers
from serve.api.models import model_json
from serve.api.service import Service
from serve.api.status import body_of, to_json
from serve.errors import Conflict, Overloaded, RookeryError
from serve.logs import get_logger
from serve.metrics import Metrics
from serve.types import ModelId, ModelInfo, Puller, PullProgress, Scope

log = get_logger()

MAX_PULLS = 8  # different ones at once, by one gateway: each has a thread
_LINE_S = 0.25  # a few lines a second are enough to see it move
_HEARTBEAT_S = 5.0  # something is said at least so often: proxies cut silent connections


def router(service: Service) -> APIRouter:
    """POST /v1/models/{id}/pull."""
    routes = APIRouter(prefix="/v1/models")
    pulls = Pulls(service.metrics)

    @routes.post(
        "/{model:path}/pull",
        responses=answers("application/x-ndjson"),
        dependencies=service.access.needs(Scope.ADMIN),
    )
    async def pull_model(model: str, request: Request) -> Response:
        wanted = ModelId.parse(model)
        if service.puller is None:
            raise Conflict(f"'{model}' cannot be pulled: this server has its Hub switched off (ROOKERY_HUB_ENABLED).")
        pull = pulls.join(wanted, model, service.puller)
        await pull.wait_until_decided()
        return StreamingResponse(pull.lines(request.url.path), media_type="application/x-ndjson")

    return routes


class _Wanted(NamedTuple):
    model_id: str  # in lower case
    revision: str | None


class Pulls:
    """Those under way, each once however many listen."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._running: dict[_Wanted, Pull] = {}

    def join(self, wanted: ModelId, model_id: str, puller: Puller) -> Pull:
        """The pull of `model_id`, begun where there is none. Raises: Overloaded."""
        key = _Wanted(str(wanted).lower(), wanted.revision)
        if found := self._running.get(key):
            return found
        if len(self._running) >= MAX_PULLS:
            raise Overloaded(f"{MAX_PULLS} models are being pulled already; try again soon.", retry_after_s=10)
        started = time.monotonic()

        def end(outcome: str) -> None:
            del self._running[key]
            self._metrics.pull_duration.labels(outcome).observe(time.monotonic() - started)

        pull = self._running[key] = Pull(puller, model_id, end)
        pull.start()
        return pull


class Pull:
    """One pull in a thread of its own, which goes on when nobody listens any more. `on_end` gets the outcome there.

    `progress`: how far it is; `result`: how it ended, None until then.
    """

    def __init__(self, puller: Puller, model_id: str, on_end: Callable[[str], None]) -> None:
        self._puller, self._model_id, self._on_end = puller, model_id, on_end
        self._loop = asyncio.get_running_loop()
        self._news = asyncio.Event()  # the next; each has its own
        self.progress = PullProgress("resolving")
        self.result: ModelInfo | RookeryError | None = None

    def start(self) -> None:
        threading.Thread(target=self._run, name="pull", daemon=True).start()

    async def wait_until_decided(self) -> None:
        """Returns when there is something to fetch, or it is done. Raises: what the Hub refuses at once."""
        while self.result is None and self.progress.phase == "resolving":
            await self._news.wait()
        self._raise()

    async def wait_until_ended(self) -> None:
        """Raises: what it ended in."""
        while self.result is None:
            await self._news.wait()
        self._raise()

    async def lines(self, path: str) -> AsyncIterator[bytes]:
        """How far it is, a few times a second, and at last how it ended."""
        while self.result is None:
            news = self._news  # before the look at how far it is: nothing is missed
            yield to_json({"object": "model.pull", "model": self._model_id, **_progress_json(self.progress)}) + b"\n"
            await asyncio.sleep(_LINE_S)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(news.wait(), _HEARTBEAT_S)
        end = self.result
        yield to_json(body_of(end, path) if isinstance(end, RookeryError) else model_json(end)) + b"\n"

    def _raise(self) -> None:
        if isinstance(self.result, RookeryError):
            raise copy.copy(self.result)  # each who waits has an error of its own

    # --- In the thread ------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            self.result = self._puller.pull(self._model_id, self._tell)
        except RookeryError as error:
            self.result = error
        except Exception:
            log.exception("pull_failed", model=self._model_id)
            self.result = RookeryError(f"The server failed to pull '{self._model_id}'; its log says why.")
        finally:
            self._on_end(self.result.code if isinstance(self.result, RookeryError) else "ok")
            self._wake()

    def _tell(self, progress: PullProgress) -> None:
        self.progress = progress
        self._wake()

    def _wake(self) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has ended: nobody listens
            self._loop.call_soon_threadsafe(self._announce)

    # --- In the loop again --------------------------------------------------------------------------------

    def _announce(self) -> None:
        told, self._news = self._news, asyncio.Event()
        told.set()


def _progress_json(progress: PullProgress) -> dict[str, Any]:
    return {
        "phase": progress.phase,
        "file": progress.file,
        "bytes": progress.num_bytes,
        "total_bytes": progress.total_bytes,
    }
