"""Models: OpenAI's list, look-up and deletion; ours are a model's versions, going back to one, its picture and faces.

An id has one slash or none, percent-encoded or not, and may name a revision behind '@'.
"""

from __future__ import annotations

from functools import partial
from typing import Annotated, Any

import anyio
import anyio.to_thread
from fastapi import APIRouter, Query, Request
from pydantic import Field
from starlette.responses import Response

from serve.api.access import Caller
from serve.api.body import Body, read_json
from serve.api.caching import cache_control
from serve.api.described import answers, takes
from serve.api.generation import check_model_id
from serve.api.lists import After, as_list, page_of
from serve.api.previews import PNG, choose_preview, face_of, image_reply, read_image
from serve.api.service import Service
from serve.api.status import json_reply
from serve.errors import ModelNotFound
from serve.types import EVERYBODY, MAX_ARCHIVES, ModelId, ModelInfo, RevisionInfo, Scope, Visibility

_Limit = Annotated[int, Query(ge=1, le=10_000)]
_MAX_DRAWN = 2  # pictures at once: each takes a core, and streams of texts need the rest


class RollbackBody(Body):
    revision: Annotated[str, Field(min_length=1, max_length=96)]


class VisibilityBody(Body):
    visibility: Annotated[Visibility, Field(strict=False)]


class PreviewBody(Body):
    text: str
    prompt: str


def router(service: Service) -> APIRouter:
    """/v1/models and what is below."""
    routes = APIRouter(prefix="/v1/models")
    catalogue, access = service.catalogue, service.access
    reads, changes = access.needs(Scope.READ), access.needs(Scope.TRAIN)
    drawing = anyio.CapacityLimiter(_MAX_DRAWN)

    @routes.get("", dependencies=reads)
    async def list_models(
        request: Request,
        limit: _Limit = 1000,
        after: After = None,
        q: Annotated[str | None, Query(max_length=256)] = None,
    ) -> Response:
        def read() -> dict[str, Any]:
            viewer = access.caller(request).viewer
            page = catalogue.list_models(limit=limit, after=after, query=q, viewer=viewer)
            return as_list([model_json(info) for info in page.items], page.has_more)

        return json_reply(await anyio.to_thread.run_sync(read))

    # Before the look-up, whose path would match these too.

    @routes.get("/{model:path}/versions", dependencies=reads)
    async def list_versions(model: str, request: Request, limit: _Limit = 1000, after: After = None) -> Response:
        def read() -> dict[str, Any]:
            if namesake := _find_namesake(service, request, model, "versions"):
                return model_json(namesake)
            viewer = access.caller(request).viewer
            if viewer == EVERYBODY:  # to others checkpoints are there before the model is
                access.find_model(catalogue, model, request)
            found = catalogue.list_revisions(str(ModelId.parse(model)), viewer)
            page = page_of(found, [_version_id(info) for info in found], limit, after)
            return as_list([version_json(info) for info in page.items], page.has_more)

        return json_reply(await anyio.to_thread.run_sync(read))

    @routes.head("/{model:path}/picture", include_in_schema=False, dependencies=reads)
    @routes.get("/{model:path}/picture", responses=answers(PNG, 304), dependencies=reads)
    async def read_picture(model: str, request: Request) -> Response:
        def read() -> Response:
            if namesake := _find_namesake(service, request, model, "picture"):
                return json_reply(model_json(namesake))
            info = access.find_model(catalogue, model, request)
            caching = cache_control(None, is_private=info.is_private)  # of any revision another may be chosen
            return image_reply(read_image(catalogue.find_picture(model)), PNG, request, caching)

        return await anyio.to_thread.run_sync(read)

    @routes.head("/{model:path}/avatar", include_in_schema=False, dependencies=reads)
    @routes.get("/{model:path}/avatar", responses=answers("image/*", 304), dependencies=reads)
    async def read_avatar(
        model: str, request: Request, number: Annotated[int, Query(ge=0, lt=MAX_ARCHIVES)] = 0
    ) -> Response:
        revision = ModelId.parse(model).revision

        def read() -> Response:
            if namesake := _find_namesake(service, request, model, "avatar"):
                return json_reply(model_json(namesake))
            info = access.find_model(catalogue, model, request)
            image, media_type = face_of(service, model, info, number)
            return image_reply(image, media_type, request, cache_control(revision, is_private=info.is_private))

        return await anyio.to_thread.run_sync(read)

    @routes.post("/{model:path}/preview", openapi_extra=takes(PreviewBody), dependencies=changes)
    async def set_preview(model: str, request: Request) -> Response:
        check_model_id(model)
        body = await read_json(request, PreviewBody, service)
        viewer = access.caller(request).viewer
        choose = partial(choose_preview, service, model, body.text, body.prompt, viewer)
        return json_reply(model_json(await anyio.to_thread.run_sync(choose, limiter=drawing)))

    @routes.post("/{model:path}/rollback", openapi_extra=takes(RollbackBody), dependencies=changes)
    async def roll_back(model: str, request: Request) -> Response:
        body = await read_json(request, RollbackBody, service)
        wanted = ModelId.parse(f"{ModelId.parse(model)}@{body.revision}")
        revision = wanted.revision
        assert revision is not None

        made_main = await anyio.to_thread.run_sync(
            catalogue.roll_back, str(wanted), revision, access.caller(request).viewer
        )
        return json_reply(version_json(made_main))

    @routes.post("/{model:path}/visibility", openapi_extra=takes(VisibilityBody), dependencies=changes)
    async def set_visibility(model: str, request: Request) -> Response:
        check_model_id(model)
        body = await read_json(request, VisibilityBody, service)

        def change() -> ModelInfo:
            catalogue.set_visibility(model, body.visibility, access.caller(request).viewer)
            return catalogue.get_model(model)

        return json_reply(model_json(await anyio.to_thread.run_sync(change)))

    @routes.get("/{model:path}", dependencies=reads)
    async def retrieve_model(model: str, request: Request) -> Response:
        check_model_id(model)
        return json_reply(model_json(await anyio.to_thread.run_sync(access.find_model, catalogue, model, request)))

    @routes.delete("/{model:path}", dependencies=changes)
    async def delete_model(model: str, request: Request) -> Response:
        deleted = await delete_everywhere(service, check_model_id(model), access.caller(request))
        return json_reply({"id": deleted, "object": "model", "deleted": True})

    return routes


async def delete_everywhere(service: Service, model_id: str, caller: Caller) -> str:
    """From disk, memory and what its jobs wrote; gives its id as it was spelled.

    Raises: ModelNotFound, NotOwner, Conflict.
    """
    delete = partial(service.catalogue.delete_model, model_id, caller.viewer, by=caller.name)
    deleted = await anyio.to_thread.run_sync(delete)
    await anyio.to_thread.run_sync(service.jobs.forget_model, deleted)
    await service.generator.forget(deleted)
    return deleted


def model_json(info: ModelInfo) -> dict[str, Any]:
    """OpenAI's four fields, then what we know besides."""
    return {
        "id": info.model_id,
        "object": "model",
        "created": info.created_at,
        "owned_by": info.owned_by,
        "revision": info.revision,
        "base_model": info.base_model,
        "handles": list(info.handles),
        "bytes": info.num_bytes,
        "num_parameters": info.num_parameters,
        "context_length": info.context_length,
        "counts": {handle: dict(counts) for handle, counts in info.counts.items()},
        "names": dict(info.names),
        "sample": info.sample,
        "tags": list(info.tags),
        "private": info.is_private,
        "disabled": info.is_disabled,
        "visibility": info.visibility.value,
        "from_hub": info.from_hub,
    }


def version_json(info: RevisionInfo) -> dict[str, Any]:
    """One version of a model; its `id` can be asked for texts."""
    return {
        "id": _version_id(info),
        "object": "model.version",
        "model": info.model_id,
        "revision": info.revision,
        "created": info.created_at,
        "bytes": info.num_bytes,
        "is_main": info.is_main,
        "job_id": info.job_id,
        "step": info.step,
        "losses": dict(info.losses),
    }


def _version_id(info: RevisionInfo) -> str:
    return f"{info.model_id}@{info.revision}"


def _find_namesake(service: Service, request: Request, model: str, word: str) -> ModelInfo | None:
    """The bot of @versions, whose path is also the one to the versions of a model `huggingtweets`: it goes first."""
    if "/" in model or "@" in model:
        return None
    try:
        return service.access.find_model(service.catalogue, check_model_id(f"{model}/{word}"), request)
    except ModelNotFound:
        return None
