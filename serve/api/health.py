"""Is the process alive, can it really write text, what is in memory, and what has it counted."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Any

from fastapi import APIRouter
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.responses import Response

from serve.api.service import Service
from serve.api.status import json_reply
from serve.errors import RookeryError, StoreUnavailable
from serve.types import Resident

log = logging.getLogger(__name__)

_READY_FOR_S = 5.0
_EXTRA_METRICS_S = 5.0


class Readiness:
    """The generator's own check, one at a time and remembered for a few seconds when it was good.

    The check goes on when a probe gives up, so a cold start longer than the probe's patience still ends.
    """

    def __init__(self, check: Callable[[], Awaitable[None]], patience_s: float) -> None:
        self._check = check
        self._patience_s = patience_s
        self._running: asyncio.Task[None] | None = None
        self._good_until = 0.0

    async def wait(self) -> None:
        """Raises: RookeryError when the generator is not ready."""
        if time.monotonic() < self._good_until:
            return
        if self._running is None or self._running.done():
            self._running = asyncio.create_task(self._run())
        try:
            await asyncio.wait_for(asyncio.shield(self._running), self._patience_s)
        except TimeoutError as exc:
            raise StoreUnavailable("Not ready yet: the base model is still being loaded.", retry_after_s=2) from exc

    async def _run(self) -> None:
        await self._check()
        self._good_until = time.monotonic() + _READY_FOR_S


def router(service: Service, extra_metrics: Callable[[], Awaitable[str]] | None) -> APIRouter:
    """/healthz, /readyz, /health, /metrics and /v1/residents."""
    routes = APIRouter()
    readiness = Readiness(service.generator.check_ready, service.limits.ready_s)

    @routes.get("/healthz")
    async def is_alive() -> Response:
        return json_reply({"status": "ok"})

    @routes.get("/readyz")
    @routes.get("/health")  # text-generation-inference's name for it
    async def is_ready() -> Response:
        try:
            await readiness.wait()
        except RookeryError as exc:
            raise StoreUnavailable(f"Not ready: {exc.message}", retry_after_s=exc.retry_after_s or 2) from exc
        return json_reply({"status": "ready"})

    @routes.get("/metrics")
    async def read_metrics() -> Response:
        text = service.metrics.render()
        if extra_metrics is not None:
            try:
                text += await asyncio.wait_for(extra_metrics(), _EXTRA_METRICS_S)
            except Exception:  # our own numbers are worth having without the others'
                log.warning("extra_metrics_unavailable", exc_info=True)
        return Response(text, media_type=CONTENT_TYPE_LATEST)

    @routes.get("/v1/residents", dependencies=service.access.required)
    async def list_residents() -> Response:
        residents = await service.generator.residents()
        return json_reply({"object": "list", "data": [_resident_json(one) for one in residents]})

    return routes


def _resident_json(resident: Resident) -> dict[str, Any]:
    return {
        "model": resident.model_id,
        "revision": resident.revision,
        "tier": resident.tier,
        "bytes": resident.num_bytes,
        "leases": resident.leases,
        "idle_s": round(resident.idle_s, 3),
        "replica": resident.replica,
    }
