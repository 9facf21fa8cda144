"""Taking a model out of use, and into it again: within a second nobody, on any replica, has it write any more.

Who asks for a model that is disabled gets 403 with the code `model_disabled`; texts under way end with that error.
"""

from __future__ import annotations

from functools import partial
from typing import Annotated

import anyio.to_thread
from fastapi import APIRouter, Request
from pydantic import Field
from starlette.responses import Response

from serve.api.body import Body, read_json
from serve.api.described import takes
from serve.api.generation import check_model_id
from serve.api.service import Service
from serve.api.status import json_reply
from serve.types import Scope


class DisableBody(Body):
    reason: Annotated[str, Field(max_length=500)] = ""


def router(service: Service) -> APIRouter:
    """POST /v1/models/{id}/disable and /enable."""
    routes = APIRouter(prefix="/v1/models", dependencies=service.access.needs(Scope.ADMIN))

    @routes.post("/{model:path}/disable", openapi_extra=takes(DisableBody))
    async def disable_model(model: str, request: Request) -> Response:
        check_model_id(model)
        body = await read_json(request, DisableBody, service)
        by = service.access.caller(request).name
        disable = partial(service.catalogue.disable, model, by=by, reason=body.reason)
        disabled = await anyio.to_thread.run_sync(disable)
        await service.generator.forget(disabled, at_once=True)
        return json_reply({"id": disabled, "object": "model", "disabled": True})

    @routes.post("/{model:path}/enable")
    async def enable_model(model: str) -> Response:
        enabled = await anyio.to_thread.run_sync(service.catalogue.enable, check_model_id(model))
        await service.generator.forget(enabled)  # what was remembered of the refusal
        return json_reply({"id": enabled, "object": "model", "disabled": False})

    return routes
