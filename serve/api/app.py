"""The HTTP application, built over the protocols of `serve.types`.

It does not know what stands behind them: an engine in this process, a Ray Serve handle, or a test's fake.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from uuid import uuid4

from fastapi import FastAPI
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.api import bots, erasures, fine_tuning, health, hub, huggingface, models, openai, pull, status, takedown, top
from serve.api import files as files_api
from serve.api.access import Access, check_origin
from serve.api.described import describe
from serve.api.guards import guard
from serve.api.quota import Quota
from serve.api.readiness import Readiness
from serve.api.service import DrawPreview, Limits, Preview, Service
from serve.api.status import CrossSite, ErrorPage, KeyInAddress, UnknownHost
from serve.errors import RateLimited, RookeryError
from serve.logs import bound, get_logger, ms
from serve.metrics import Metrics
from serve.types import Catalogue, Eraser, Files, Generator, Jobs, Puller

log = get_logger()

_REQUEST_ID = re.compile(r"[!-~]{1,128}", re.ASCII)
# Asked again and again by machines: a line only when they fail.
_UNTOLD_ROUTES = ("/healthz", "/readyz", "/health", "/metrics")
_STATIC = "/static/"  # what pages are made of, and a browser keeps: in no limit, as the routes above
_SAFE_METHODS = ("GET", "HEAD", "OPTIONS")
_REASONS = {CrossSite: "cross_site", UnknownHost: "unknown_host", KeyInAddress: "key_in_address"}  # of the metric
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
    limits: Limits | None = None,
    preview: Preview | None = None,
    draw_preview: DrawPreview | None = None,
    add_pages: Callable[[FastAPI, Service], ErrorPage] | None = None,
    puller: Puller | None = None,
    eraser: Eraser | None = None,
    access: Access | None = None,
    quota: Quota | None = None,
    sends_request_id: bool = True,
) -> FastAPI:
    """All routes over the given parts, and the pages of `add_pages`.

    `add_pages` gives back how an error looks to somebody with a browser, wherever it happens. `sends_request_id` is
    False behind a server that puts x-request-id into every answer itself.
    """
    upload_dir.mkdir(parents=True, exist_ok=True)
    limits, metrics = limits or Limits(), metrics or Metrics(enabled=False)
    service = Service(
        generator=generator,
        catalogue=catalogue,
        files=files,
        jobs=jobs,
        upload_dir=upload_dir,
        default_base=default_base,
        readiness=Readiness(generator.check_ready, limits.ready_s),
        metrics=metrics,
        limits=limits,
        preview=preview,
        draw_preview=draw_preview,
        puller=puller,
        eraser=eraser,
        access=access or Access(metrics=metrics),
        quota=quota or Quota(metrics=metrics),
    )

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await service.quota.close()

    app = FastAPI(title="Rookery", docs_url=None, redoc_url=None, redirect_slashes=False, lifespan=lifespan)
    for router in (
        openai.router(service),
        models.router(service),
        pull.router(service),
        takedown.router(service),
        erasures.router(service),
        files_api.router(service),
        fine_tuning.router(service),
        bots.router(service),
        huggingface.router(service),
        health.router(service),
        top.router(service),
    ):
        app.include_router(router)
    error_page = add_pages(app, service) if add_pages else None
    status.install(app, error_page)
    app.include_router(hub.router(service))  # last: its paths begin with any model's name
    describe(app)
    app.add_middleware(RequestBorder, service=service, error_page=error_page, sends_id=sends_request_id)
    return app


class RequestBorder:
    """Around every request: its id, its count, duration and line in the log, and always an answer of ours."""

    def __init__(self, app: ASGIApp, service: Service, error_page: ErrorPage | None, sends_id: bool) -> None:
        self._app = app
        self._metrics = service.metrics
        self._access = service.access
        self._quota = service.quota
        self._error_page = error_page
        self._sends_id = sends_id

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = _request_id(scope)
        with bound(request_id=request_id):
            await self._answer_one(request_id, scope, receive, send)

    async def _answer_one(self, request_id: str, scope: Scope, receive: Receive, send: Send) -> None:
        arrived = time.perf_counter()
        scope.setdefault("state", {}).update(request_id=request_id, arrived=arrived)
        answered = 0
        self._metrics.requests_in_progress.inc()

        async def send_with_id(message: Message) -> None:
            nonlocal answered
            if message["type"] == "http.response.start":
                answered = message["status"]
                headers = MutableHeaders(scope=message)
                guard(headers)
                if self._sends_id:
                    headers["x-request-id"] = request_id
                if (allowance := scope["state"].get("allowance")) is not None:
                    headers.update(allowance.headers())
            elif scope["method"] == "HEAD" and message["type"] == "http.response.body":
                message = {**message, "body": b""}
            await send(message)

        try:
            self._check(scope)
            await self._take_request(scope)
            await self._app(scope, receive, send_with_id)
        except (CrossSite, UnknownHost, KeyInAddress) as refused:
            self._metrics.auth_failures.labels(_REASONS[type(refused)]).inc()
            await self._answer(refused, scope)(scope, receive, send_with_id)
        except RateLimited as refused:
            await self._answer(refused, scope)(scope, receive, send_with_id)
        except ClientDisconnect:
            answered = answered or _CLIENT_LEFT
        except (Exception, asyncio.CancelledError) as failed:
            if isinstance(failed, asyncio.CancelledError) and _is_being_cancelled():
                raise
            log.exception("request_failed")
            if answered:
                scope["state"]["broken"] = 500
                raise  # the head is out: closing the connection is all that is left
            error = RookeryError(f"The server failed on this request; its id is {request_id}.")
            await self._answer(error, scope)(scope, receive, send_with_id)
        finally:
            self._metrics.requests_in_progress.dec()
            route = getattr(scope.get("route"), "path", "other")
            code = scope["state"].get("broken") or answered or _CLIENT_LEFT  # what broke under a 200 has failed
            self._metrics.requests.labels(route, str(code)).inc()
            self._metrics.request_duration.labels(route).observe(time.perf_counter() - arrived)
            _tell(scope["method"], route, code, time.perf_counter() - arrived)

    def _check(self, scope: Scope) -> None:
        """Raises: UnknownHost, KeyInAddress, CrossSite."""
        headers = Headers(scope=scope)
        self._access.check_host(headers)
        self._access.check_address(scope, headers)
        if scope["method"] not in _SAFE_METHODS:
            check_origin(headers)

    async def _take_request(self, scope: Scope) -> None:
        """Before anything of it is read. Raises: RateLimited."""
        request = Request(scope)
        allowance = request.state.allowance = self._quota.allowance(self._access.caller(request), request)
        if scope["path"] not in _UNTOLD_ROUTES and not scope["path"].startswith(_STATIC):
            await self._quota.take_request(allowance)

    def _answer(self, error: RookeryError, scope: Scope) -> Response:
        try:
            return status.answer_to(error, Request(scope), self._error_page)
        except Exception:  # pages themselves may be what is broken
            log.exception("error_page_failed")
            return status.reply_to(error, scope["path"])


def _is_being_cancelled() -> bool:
    """Else it is something that this request waited for that was: a call of a replica that has just ended, say."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


def _tell(method: str, route: str, code: int, duration_s: float) -> None:
    if code < 400 and route in _UNTOLD_ROUTES:
        return
    say = log.warning if code >= 500 else log.info
    say("request", method=method, route=route, status=code, duration_ms=ms(duration_s))


def _request_id(scope: Scope) -> str:
    """The caller's own, unless it has more than 128 characters, or others than ASCII's visible ones."""
    given = Headers(scope=scope).get("x-request-id", "")
    return given if _REQUEST_ID.fullmatch(given) else f"req-{uuid4().hex}"
