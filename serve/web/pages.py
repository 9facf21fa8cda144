"""How a page comes about: a template, what every page knows, and the headers that keep a browser to this server.

Templates escape everything they are given. Knows no page in particular.
"""

from __future__ import annotations

import gzip
import hashlib
from collections.abc import Callable, Coroutine, Mapping
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import quote

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from starlette.responses import RedirectResponse, Response

from serve.api.service import Service
from serve.api.status import KeyNeeded, invalid, status_of
from serve.errors import RookeryError
from serve.web import show
from serve.web.bots import BotView

FOLDER = Path(__file__).parent
STATIC = FOLDER / "static"

_GZIP_LEVEL = 5  # 20 kB in half a millisecond

# Nothing is loaded from elsewhere, nothing runs that is not a file of ours, nobody puts the page into a frame.
SECURITY = {
    "content-security-policy": (
        "default-src 'self'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'; object-src 'none'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
}


class Pages:
    """Renders templates for the browsers of one service."""

    def __init__(self, service: Service) -> None:
        self._access = service.access
        self._templates = Environment(
            loader=FileSystemLoader(FOLDER / "templates"),
            autoescape=True,
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        self._templates.filters.update(
            number=show.number, size=show.size, date=show.date, ago=show.ago, duration=show.duration, iso=show.iso
        )
        self._templates.globals.update(static=static_url, bot_url=bot_url, view=BotView)

    def render(self, request: Request, template: str, status: int = 200, **context: Any) -> Response:
        """The page, which no cache keeps. `request` decides on what is offered."""
        text = self._templates.get_template(template).render(
            context,
            path=request.url.path,
            here=_address(request),
            has_key=self._access.has_key(request),
            needs_keys=self._access.needs_keys,
        )
        headers = SECURITY | {"cache-control": "no-store"}
        return zipped(request, text.encode("utf-8", "replace"), "text/html; charset=utf-8", status, headers)

    def render_error(self, request: Request, error: RookeryError) -> Response:
        """What went wrong in a sentence, and ways on."""
        status = status_of(error, "/v1")
        return self.render(request, "error.html", status, message=error.message, code=status)


def page_route(pages: Pages) -> type[APIRoute]:
    """A kind of route whose errors are pages."""

    class PageRoute(APIRoute):
        def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
            answer = super().get_route_handler()

            async def answer_with_page(request: Request) -> Response:
                try:
                    return await answer(request)
                except KeyNeeded:
                    return go(f"/login?next={quote(_address(request), safe='')}")
                except RookeryError as exc:
                    return pages.render_error(request, exc)
                except RequestValidationError as exc:
                    return pages.render_error(request, invalid(exc))

            return answer_with_page

    return PageRoute


def zipped(
    request: Request, body: bytes, media_type: str, status: int = 200, headers: Mapping[str, str] | None = None
) -> Response:
    """The answer, in a third of its bytes for who takes it so."""
    headers = {**(headers or {}), "vary": "accept-encoding"}
    if "gzip" in request.headers.get("accept-encoding", ""):
        body, headers = gzip.compress(body, _GZIP_LEVEL, mtime=0), headers | {"content-encoding": "gzip"}
    return Response(body, status, headers, media_type=media_type)


def go(address: str) -> Response:
    """On to another page of ours, by GET."""
    return RedirectResponse(address, 303, SECURITY)


def wants_page(request: Request) -> bool:
    """Whether a browser asks, to show the answer to somebody."""
    return request.method == "GET" and "text/html" in request.headers.get("accept", "")


def bot_url(model_id: str) -> str:
    """The page of a model, or of one revision of it."""
    return f"/bots/{quote(model_id, safe='/@')}"


@cache
def static_files() -> Mapping[str, Path]:
    return {path.name: path for path in sorted(STATIC.iterdir()) if path.is_file()}


@cache
def _digest() -> str:
    """Of all static files together: scripts import each other, so they change their address together."""
    total = hashlib.sha256()
    for name, path in static_files().items():
        total.update(name.encode() + b"\0" + path.read_bytes())
    return total.hexdigest()[:12]


def static_url(name: str) -> str:
    """An address that names one content for ever."""
    assert name in static_files(), name
    return f"/static/{_digest()}/{name}"


def _address(request: Request) -> str:
    return request.url.path + (f"?{request.url.query}" if request.url.query else "")
