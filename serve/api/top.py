"""Who uses the service most, as programs read it; the page of it is the operator's, in `serve.web`."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Query
from starlette.responses import Response

from serve.api.service import Service
from serve.api.status import json_reply
from serve.types import Ranking, Scope, Use

MAX_TOP = 100


def router(service: Service) -> APIRouter:
    """/v1/top."""
    routes = APIRouter(prefix="/v1")

    @routes.get("/top", dependencies=service.access.needs(Scope.ADMIN))
    async def show_top(limit: Annotated[int, Query(ge=1, le=MAX_TOP)] = 20) -> Response:
        top = await service.generator.top(limit)
        told = {
            "object": "top",
            "window_s": round(top.window_s),
            "requests": top.num_requests,
            "tokens": top.num_tokens,
            "models": _ranking_json("model", top.models),
            "callers": _ranking_json("caller", top.callers),
        }
        return json_reply(told)

    return routes


def _ranking_json(noun: str, ranking: Ranking) -> dict[str, list[dict[str, Any]]]:
    def use_json(use: Use) -> dict[str, Any]:
        errors = {"requests_error": use.requests_error, "tokens_error": use.tokens_error}
        return {noun: use.name, "requests": use.requests, "tokens": use.tokens, **errors}

    return {
        "by_requests": [use_json(use) for use in ranking.by_requests],
        "by_tokens": [use_json(use) for use in ranking.by_tokens],
    }
