"""How a page comes about: a template, what every page knows, and the headers that keep a browser to this server.

Templates escape everything they are given. Knows no page in particular.
"""

from __future__ import annotations

import gzip
import hashlib
import re
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
from serve.api.status import KeyNeeded, RouteNotFound, challenge, invalid, retry_headers, status_of
from serve.errors import RookeryError
from serve.web import show
from serve.web.bots import BotView

FOLDER = Path(__file__).parent
STATIC = FOLDER / "static"

_GZIP_LEVEL = 5  # 20 kB in half a millisecond
_NEVER = re.compile(r"q\s*=\s*0(\.0*)?")  # RFC 9110, 12.4.2
_KINDS = {".css": "text/css; charset=utf-8", ".js": "text/javascript; charset=utf-8", ".svg": "image/svg+xml"}
_FOR_EVER = "public, max-age=31536000, immutable"

# Nothing is loaded from elsewhere, nothing runs that is not a file of ours, nobody puts the page into a frame.
SECURITY = {
    "content-security-policy": (
        "default-src 'self'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'; object-src 'none'"
    ),
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

    def render(
        self,
        request: Request,
        template: str,
        status: int = 200,
        headers: Mapping[str, str] | None = None,
        **context: Any,
    ) -> Response:
        """The page, which no cache keeps. `request` decides on what is offered."""
        text = self._templates.get_template(template).render(
            context,
            path=request.url.path,
            here=_address(request),
            caller=self._access.caller(request),
            needs_keys=self._access.needs_keys,
        )
        headers = {**SECURITY, "cache-control": "no-store", **(headers or {})}
        return zipped(request, text.encode("utf-8", "replace"), "text/html; charset=utf-8", status, headers)

    def render_error(self, request: Request, error: RookeryError) -> Response:
        """What went wrong in a sentence, and ways on; where a key is missing, the page that asks for one."""
        if isinstance(error, KeyNeeded):
            return go(f"/login?next={quote(_address(request), safe='')}")
        status = status_of(error, "/v1")
        headers = retry_headers(error, status) | challenge(error)
        return self.render(request, "error.html", status, headers, message=error.message, code=status)


def page_route(pages: Pages) -> type[APIRoute]:
    """A kind of route whose errors are pages, and that takes HEAD wherever it takes GET."""

    class PageRoute(APIRoute):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            if self.methods and "GET" in self.methods:
                self.methods.add("HEAD")

        def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
            answer = super().get_route_handler()

            async def answer_with_page(request: Request) -> Response:
                try:
                    return await answer(request)
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
    if not _takes_gzip(request):
        return _reply(body, media_type, status, headers)
    return _reply(_zip(body), media_type, status, {**(headers or {}), "content-encoding": "gzip"})


def static_reply(request: Request, digest: str, name: str) -> Response:
    """A static file, for ever at the address that names its content. Raises: RouteNotFound."""
    if name not in static_files():
        raise RouteNotFound("There is no such file here.")
    # A page of another version of this program asked, or is about to: what is here now must not be kept as its own.
    caching = _FOR_EVER if digest == _digest() else "no-store"
    is_zipped = _takes_gzip(request)
    coding = {"content-encoding": "gzip"} if is_zipped else {}
    kind = _KINDS[static_files()[name].suffix]
    return _reply(_static_body(name, is_zipped), kind, 200, {**SECURITY, **coding, "cache-control": caching})


def _reply(body: bytes, media_type: str, status: int, headers: Mapping[str, str] | None) -> Response:
    return Response(body, status, {**(headers or {}), "vary": "accept-encoding"}, media_type=media_type)


def _takes_gzip(request: Request) -> bool:
    for accepted in request.headers.get("accept-encoding", "").lower().split(","):
        coding, _, weight = accepted.partition(";")
        if coding.strip() == "gzip":
            return _NEVER.fullmatch(weight.strip()) is None
    return False


def _zip(body: bytes) -> bytes:
    return gzip.compress(body, _GZIP_LEVEL, mtime=0)


def go(address: str) -> Response:
    """On to another page of ours, by GET."""
    return RedirectResponse(address, 303, SECURITY)


def wants_page(request: Request) -> bool:
    """Whether a browser asks, to show the answer to somebody."""
    return request.method in ("GET", "HEAD", "POST") and "text/html" in request.headers.get("accept", "")


def bot_url(model_id: str) -> str:
    """The page of a model, or of one revision of it."""
    return f"/bots/{quote(model_id, safe='/@')}"


@cache
def static_files() -> Mapping[str, Path]:
    return {path.name: path for path in sorted(STATIC.iterdir()) if path.is_file()}


@cache
def _static_body(name: str, is_zipped: bool) -> bytes:
    body = static_files()[name].read_bytes()
    return _zip(body) if is_zipped else body


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
