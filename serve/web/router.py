"""All pages: what people see of the service, rendered here, improved by small scripts, whole without them."""

from __future__ import annotations

import contextlib

from fastapi import APIRouter, FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.responses import FileResponse, Response

from serve.api.service import Service
from serve.api.status import RouteNotFound
from serve.errors import ModelNotFound
from serve.types import ModelId
from serve.web import bot, home, job, jobs_list, login, make, operator
from serve.web.pages import SECURITY, Pages, bot_url, go, static_files, wants_page, zipped

_KINDS = {".css": "text/css; charset=utf-8", ".js": "text/javascript; charset=utf-8", ".svg": "image/svg+xml"}
_FOR_EVER = {"cache-control": "public, max-age=31536000, immutable"}


def add_pages(app: FastAPI, service: Service) -> None:
    """Adds the pages, and has browsers that ask for what is nowhere shown a page too."""
    pages = Pages(service)
    for router in (
        home.router(service, pages),
        login.router(service, pages),
        make.router(service, pages),
        job.router(service, pages),
        jobs_list.router(service, pages),
        operator.router(service, pages),
        bot.router(service, pages),
        _static(),
    ):
        app.include_router(router)
    _answer_lost_browsers(app, pages)


def _static() -> APIRouter:
    routes = APIRouter(include_in_schema=False)

    @routes.get("/static/{digest}/{name}")
    async def read_static(digest: str, name: str, request: Request) -> Response:
        path = static_files().get(name)
        if path is None:
            raise RouteNotFound("There is no such file here.")
        return zipped(request, path.read_bytes(), _KINDS[path.suffix], headers=SECURITY | _FOR_EVER)

    @routes.get("/favicon.ico")
    async def read_icon() -> Response:
        return FileResponse(static_files()["rook.svg"], headers=SECURITY)

    return routes


def _answer_lost_browsers(app: FastAPI, pages: Pages) -> None:
    """A model's address on the Hub leads to its page here; anything else unknown to a page that says so."""
    answer_others = app.exception_handlers[HTTPException]

    async def on_http_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        if error.status_code not in (404, 405) or not wants_page(request):
            reply: Response = await answer_others(request, error)  # type: ignore[misc]
            return reply
        with contextlib.suppress(ModelNotFound):
            if error.status_code == 404:  # 405: an address of ours that is none of a page, such as /logout
                return go(bot_url(str(ModelId.parse(request.url.path.strip("/")))))
        return pages.render_error(request, RouteNotFound("There is no page at this address."))

    app.add_exception_handler(HTTPException, on_http_error)
