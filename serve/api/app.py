"""The HTTP application, built over the protocols of `serve.types`.

It does not know what stands behind them: an engine in this process, a Ray Serve handle, or a test's fake.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from uuid import uuid4

from fastapi import FastAPI
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.api import bots, fine_tuning, health, hub, huggingface, models, openai, pull, status
from serve.api import files as files_api
from serve.api.access import Access, check_origin
from serve.api.readiness import Readiness
from serve.api.service import DrawPreview, Limits, Preview, Service
from serve.api.status import CrossSite, ErrorPage, UnknownHost
from serve.errors import RookeryError
from serve.metrics import Metrics
from serve.types import Catalogue, Files, Generator, Jobs, Puller

log = logging.getLogger(__name__)

_REQUEST_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}", re.ASCII)
_SAFE_METHODS = ("GET", "HEAD", "OPTIONS")
_CLIENT_LEFT = 499  # nginx's number, for the metrics only: nobody is there to read it


def build_api(
    *,
    generator: Generator,
    catalogue: Catalogue,
    files: Files,
    jobs: Jobs,
    upload_dir: Path,
    default_base: str = "fledgling",
    metrics: Metrics | None = None,
    extra_metrics: Callable[[], Awaitable[str]] | None = None,
    limits: Limits | None = None,
    preview: Preview | None = None,
    draw_preview: DrawPreview | None = None,
    add_pages: Callable[[FastAPI, Service], ErrorPage] | None = None,
    puller: Puller | None = None,
    access: Access | None = None,
    sends_request_id: bool = True,
) -> FastAPI:
    """All routes over the given parts, and the pages of `add_pages`. `extra_metrics`: of other processes.

    `add_pages` gives back how an error looks to somebody with a browser, wherever it happens. `sends_request_id` is
    False behind a server that puts x-request-id into every answer itself.
    """
    upload_dir.mkdir(parents=True, exist_ok=True)
    limits = limits or Limits()
    service = Service(
        generator=generator,
        catalogue=catalogue,
        files=files,
        jobs=jobs,
        upload_dir=upload_dir,
        default_base=default_base,
        readiness=Readiness(generator.check_ready, limits.ready_s),
        metrics=metrics or Metrics(),
        limits=limits,
        preview=preview,
        draw_preview=draw_preview,
        puller=puller,
        access=access or Access(),
    )
    app = FastAPI(title="Rookery", docs_url=None, redoc_url=None, redirect_slashes=False)
    for router in (
        openai.router(service),
        models.router(service),
        pull.router(service),
        files_api.router(service),
        fine_tuning.router(service),
        bots.router(service),
        huggingface.router(service),
        health.router(service, extra_metrics),
    ):
        app.include_router(router)
    error_page = add_pages(app, service) if add_pages else None
    status.install(app, error_page)
    app.include_router(hub.router(service))  # last: its paths begin with any model's name
    app.add_middleware(RequestBorder, service=service, error_page=error_page, sends_id=sends_request_id)
    return app


class RequestBorder:
    """Around every request: its id, its count and duration, and an answer of ours whatever goes wrong inside."""

    def __init__(self, app: ASGIApp, service: Service, error_page: ErrorPage | None, sends_id: bool) -> None:
        self._app = app
        self._metrics = service.metrics
        self._access = service.access
        self._error_page = error_page
        self._sends_id = sends_id

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        arrived = time.perf_counter()
        request_id = _request_id(scope)
        scope.setdefault("state", {}).update(request_id=request_id, arrived=arrived)
        answered = 0

        async def send_with_id(message: Message) -> None:
            nonlocal answered
            if message["type"] == "http.response.start":
                answered = message["status"]
                if self._sends_id:
                    MutableHeaders(scope=message)["x-request-id"] = request_id
            elif scope["method"] == "HEAD" and message["type"] == "http.response.body":
                message = {**message, "body": b""}
            await send(message)

        try:
            self._check(scope)
            await self._app(scope, receive, send_with_id)
        except (CrossSite, UnknownHost) as refused:
            await self._answer(refused, scope)(scope, receive, send_with_id)
        except ClientDisconnect:
            answered = answered or _CLIENT_LEFT
        except Exception:
            log.exception("request_failed request_id=%s", request_id)
            if answered:
                raise  # the head is out: closing the connection is all that is left
            error = RookeryError(f"The server failed on this request; its id is {request_id}.")
            await self._answer(error, scope)(scope, receive, send_with_id)
        finally:
            route = getattr(scope.get("route"), "path", "other")
            self._metrics.requests.labels(route, str(answered or _CLIENT_LEFT)).inc()
            self._metrics.request_duration.labels(route).observe(time.perf_counter() - arrived)

    def _check(self, scope: Scope) -> None:
        """Raises: UnknownHost, CrossSite."""
        headers = Headers(scope=scope)
        self._access.check_host(headers)
        if scope["method"] not in _SAFE_METHODS:
            check_origin(headers)

    def _answer(self, error: RookeryError, scope: Scope) -> Response:
        try:
            return status.answer_to(error, Request(scope), self._error_page)
        except Exception:  # pages themselves may be what is broken
            log.exception("error_page_failed")
            return status.reply_to(error, scope["path"])


def _request_id(scope: Scope) -> str:
    """The caller's own, when it is fit for a log line."""
    given = Headers(scope=scope).get("x-request-id", "")
    return given if _REQUEST_ID.fullmatch(given) else f"req-{uuid4().hex}"
