"""Signing in, where the server has keys: the browser keeps one and sends it with every request to this server."""

from __future__ import annotations

from typing import Annotated
from urllib.parse import quote

from fastapi import APIRouter, Query, Request
from starlette.responses import Response

from serve.api.access import cookie_name
from serve.api.body import read_fields
from serve.api.service import Service
from serve.web.pages import Pages, go, page_route

_DAYS = 30


def router(service: Service, pages: Pages) -> APIRouter:
    """/login and /logout"""
    routes = APIRouter(route_class=page_route(pages), include_in_schema=False)
    access = service.access

    @routes.get("/login")
    async def ask_for_key(request: Request, next: Annotated[str, Query(max_length=2048)] = "/") -> Response:
        return pages.render(request, "login.html", next=_local(next), error="")

    @routes.post("/login")
    async def sign_in(request: Request) -> Response:
        fields = await read_fields(request, service)
        key, onward = fields.get("key", [""])[-1].strip(), _local(fields.get("next", ["/"])[-1])
        if not access.needs_keys:
            return go(onward)
        if not access.opens(key):
            service.metrics.auth_failures.labels("wrong" if key else "missing").inc()
            error = "That is none of this server's keys. Whoever runs it can make you one."
            return pages.render(request, "login.html", 401, next=onward, error=error)
        reply = go(onward)
        reply.set_cookie(
            cookie_name(request),
            quote(key, safe=""),
            max_age=_DAYS * 86_400,
            httponly=True,
            samesite="strict",
            secure=_is_https(request),
        )
        return reply

    @routes.post("/logout")
    async def sign_out(request: Request) -> Response:
        reply = go("/")
        reply.delete_cookie(cookie_name(request))
        return reply

    return routes


def _is_https(request: Request) -> bool:
    """Also as a proxy says, trusted or not: who lies here gets a cookie that is sent less often."""
    return "https" in (
        request.url.scheme,
        request.headers.get("x-forwarded-proto", "").partition(",")[0].strip().lower(),
    )


def _local(address: str) -> str:
    """`address` if it is a page of ours, else the front page: nobody is sent elsewhere from here."""
    is_ours = address.startswith("/") and not address.startswith("//") and address.isprintable() and "\\" not in address
    return address if is_ours else "/"
