"""All pages: what people see of the service, rendered here, improved by small scripts, whole without them."""

from __future__ import annotations

from fastapi import APIRouter, FastAPI, Request
from starlette.responses import FileResponse, Response

from serve.api.service import Service
from serve.api.status import ErrorPage, MethodNotAllowed, RouteNotFound
from serve.errors import ModelNotFound, RookeryError
from serve.types import ModelId
from serve.web import bot, home, job, jobs_list, login, make, operator
from serve.web.pages import SECURITY, Pages, bot_url, go, static_files, static_reply, wants_page

_NO_NAMESPACES = {"admin", "api", "bots", "jobs", "make", "static", "v1"}  # addresses begin so that are no model's


def add_pages(app: FastAPI, service: Service) -> ErrorPage:
    """Adds the pages; what it gives back is the page of an error, wherever a browser meets one."""
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
    return _error_page(pages)


def _static() -> APIRouter:
    routes = APIRouter(include_in_schema=False)

    @routes.head("/static/{digest}/{name}")
    @routes.get("/static/{digest}/{name}")
    async def read_static(digest: str, name: str, request: Request) -> Response:
        return static_reply(request, digest, name)

    @routes.head("/favicon.ico")
    @routes.get("/favicon.ico")
    async def read_icon() -> Response:
        return FileResponse(static_files()["rook.svg"], headers=SECURITY)

    return routes


def _error_page(pages: Pages) -> ErrorPage:
    def show(request: Request, error: RookeryError) -> Response | None:
        if not wants_page(request):
            return None
        if isinstance(error, RouteNotFound) and (address := _bot_address(request)):
            return go(address)
        if isinstance(error, RouteNotFound | MethodNotAllowed):
            error = RouteNotFound("There is no page at this address.")
        return pages.render_error(request, error)

    return show


def _bot_address(request: Request) -> str | None:
    """The page of the model whose address this is on the Hub, if it can be one's."""
    path = request.url.path.strip("/")
    if path.partition("/")[0].lower() in _NO_NAMESPACES:
        return None
    try:
        return bot_url(str(ModelId.parse(path)))
    except ModelNotFound:
        return None
