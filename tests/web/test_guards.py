"""Every answer, whatever it is, tells a browser what it is not to do with it."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from fastapi.routing import APIRoute

from serve.web.pages import FOLDER
from tests.web.conftest import World

_VALUES = {"model": "huggingtweets/ada", "model_id": "huggingtweets/ada"}


def _routes(router: Any) -> Iterator[APIRoute]:
    """Those of the routers within, too: FastAPI keeps them as they were included."""
    for route in router.routes:
        if isinstance(route, APIRoute):
            yield route
        elif (inner := getattr(route, "original_router", None)) is not None:
            yield from _routes(inner)


def _address(route: APIRoute) -> str:
    names = route.param_convertors
    return route.path_format.format(**{name: _VALUES.get(name, "0") for name in names})


async def test_b11_every_route_guards_its_answers(world: World) -> None:
    """Pages, files, streams and errors alike: each method of each route, asked without a body."""
    routes = list(_routes(world.app))
    assert len(routes) > 50
    async with world.client() as client:
        for route in routes:
            for method in sorted(route.methods or ()):
                async with asyncio.timeout(20):
                    answer = await client.request(method, _address(route))
                assert _is_guarded(answer), (method, route.path, answer.status_code, answer.headers)


@pytest.mark.parametrize("address", ["/nowhere", "/v1/nowhere", "/static/0/none.js", "/v1/models/%00", "/favicon.ico"])
async def test_b11_what_is_nowhere_is_guarded_too(client: httpx.AsyncClient, address: str) -> None:
    assert _is_guarded(await client.get(address))


def _is_guarded(answer: httpx.Response) -> bool:
    policy = answer.headers.get_list("content-security-policy")
    return (
        len(policy) == 1
        and "default-src" in policy[0]
        and "unsafe" not in policy[0]
        and ("frame-ancestors 'none'" in policy[0] or "sandbox" in policy[0])
        and answer.headers.get_list("x-content-type-options") == ["nosniff"]
        and answer.headers["x-frame-options"] == "DENY"
        and answer.headers["referrer-policy"] == "same-origin"
        and "camera=()" in answer.headers["permissions-policy"]
    )


def test_b11_scripts_put_texts_into_pages_as_texts() -> None:
    """What a model writes never becomes markup: nothing of ours takes a string for HTML or for code."""
    ways = r"(inner|outer)HTML\s*\+?=[^=]|insertAdjacentHTML|document\.write|\beval\(|new Function|setHTML"
    scripts = sorted((FOLDER / "static").glob("*.js"))
    assert scripts and re.search(ways, "part.innerHTML = text")
    assert [path.name for path in scripts if re.search(ways, path.read_text(encoding="utf-8"))] == []
