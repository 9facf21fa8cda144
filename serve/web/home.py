"""The front page: what this is, and the bots that are here, the newest first."""

from __future__ import annotations

from typing import Annotated
from urllib.parse import urlencode

import anyio.to_thread
from fastapi import APIRouter, Query, Request
from starlette.responses import Response

from serve.api.service import Service
from serve.errors import InvalidRequest
from serve.types import ModelInfo, Page, Scope
from serve.web.bots import BotView
from serve.web.pages import Pages, page_route

PAGE_SIZE = 24


def router(service: Service, pages: Pages) -> APIRouter:
    """/"""
    routes = APIRouter(route_class=page_route(pages), include_in_schema=False)

    @routes.get("/", dependencies=service.access.needs(Scope.READ))
    async def show_home(
        request: Request,
        q: Annotated[str, Query(max_length=256)] = "",
        before: Annotated[str | None, Query(max_length=300)] = None,
    ) -> Response:
        asked, older_than = q.strip(), _read_cursor(before)

        def read() -> Page[ModelInfo]:
            return service.catalogue.list_models(
                limit=PAGE_SIZE,
                older_than=older_than,
                query=asked or None,
                newest_first=True,
                viewer=service.access.caller(request).viewer,
            )

        page = await anyio.to_thread.run_sync(read)
        following = _address(asked, page.items[-1]) if page.has_more else None
        bots = [BotView(info) for info in page.items]
        return pages.render(request, "home.html", bots=bots, query=asked, is_first=before is None, following=following)

    return routes


def _address(query: str, last: ModelInfo) -> str:
    fields = {"q": query} if query else {}
    return "/?" + urlencode({**fields, "before": f"{last.created_at} {last.model_id}"})


def _read_cursor(before: str | None) -> tuple[int, str] | None:
    """The last bot of the page before: when it was made, and its id."""
    if before is None:
        return None
    created_at, _, model_id = before.partition(" ")
    if not (created_at.isdecimal() and len(created_at) <= 12 and model_id):
        raise InvalidRequest("'before' is no place in the list of bots; start again at its first page.", param="before")
    return int(created_at), model_id
