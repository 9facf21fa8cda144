"""Models: OpenAI's list, look-up and deletion; ours are the versions of a model, going back to one, and its picture.

An id has one slash or none, percent-encoded or not, and may name a revision behind '@'.
"""

from __future__ import annotations

from hashlib import blake2b
from pathlib import Path
from typing import Annotated, Any

import anyio.to_thread
from fastapi import APIRouter, Query, Request
from pydantic import Field
from starlette.responses import Response

from serve.api.body import Body, read_json
from serve.api.caching import cache_control, is_known
from serve.api.generation import check_model_id
from serve.api.lists import After, as_list, page_of
from serve.api.service import Service
from serve.api.status import json_reply
from serve.errors import ModelNotFound
from serve.types import ModelId, ModelInfo, RevisionInfo

_Limit = Annotated[int, Query(ge=1, le=10_000)]

_MAX_PICTURE_BYTES = 8 << 20  # ours have some 100 kB; a folder from elsewhere may hold anything under that name


class RollbackBody(Body):
    revision: Annotated[str, Field(min_length=1, max_length=96)]


def router(service: Service) -> APIRouter:
    """/v1/models and what is below."""
    routes = APIRouter(prefix="/v1/models")
    catalogue, access = service.catalogue, service.access

    @routes.get("")
    async def list_models(
        request: Request,
        limit: _Limit = 1000,
        after: After = None,
        q: Annotated[str | None, Query(max_length=256)] = None,
    ) -> Response:
        def read() -> dict[str, Any]:
            with_private = access.has_key(request)
            page = catalogue.list_models(limit=limit, after=after, query=q, with_private=with_private)
            return as_list([model_json(info) for info in page.items], page.has_more)

        return json_reply(await anyio.to_thread.run_sync(read))

    # Before the look-up, whose path would match these too.

    @routes.get("/{model:path}/versions")
    async def list_versions(model: str, request: Request, limit: _Limit = 1000, after: After = None) -> Response:
        def read() -> dict[str, Any]:
            if namesake := _find_namesake(service, request, model, "versions"):
                return model_json(namesake)
            if not access.has_key(request):  # with one, checkpoints are there before the model is
                access.find_model(catalogue, model, request)
            found = catalogue.list_revisions(str(ModelId.parse(model)))
            page = page_of(found, [_version_id(info) for info in found], limit, after)
            return as_list([version_json(info) for info in page.items], page.has_more)

        return json_reply(await anyio.to_thread.run_sync(read))

    @routes.get("/{model:path}/picture")
    async def read_picture(model: str, request: Request) -> Response:
        revision = ModelId.parse(model).revision

        def read() -> Response:
            if namesake := _find_namesake(service, request, model, "picture"):
                return json_reply(model_json(namesake))
            info = access.find_model(catalogue, model, request)
            caching = cache_control(revision, is_private=info.is_private)
            return _picture_reply(_read(catalogue.find_picture(model)), request, caching)

        return await anyio.to_thread.run_sync(read)

    @routes.post("/{model:path}/rollback", dependencies=access.required)
    async def roll_back(model: str, request: Request) -> Response:
        body = await read_json(request, RollbackBody, service.limits)
        wanted = ModelId.parse(f"{ModelId.parse(model)}@{body.revision}")
        revision = wanted.revision
        assert revision is not None

        made_main = await anyio.to_thread.run_sync(catalogue.roll_back, str(wanted), revision)
        return json_reply(version_json(made_main))

    @routes.get("/{model:path}")
    async def retrieve_model(model: str, request: Request) -> Response:
        check_model_id(model)
        return json_reply(model_json(await anyio.to_thread.run_sync(access.find_model, catalogue, model, request)))

    @routes.delete("/{model:path}", dependencies=access.required)
    async def delete_model(model: str) -> Response:
        check_model_id(model)
        deleted = await anyio.to_thread.run_sync(catalogue.delete_model, model)
        await anyio.to_thread.run_sync(service.jobs.forget_model, deleted)
        await service.generator.forget(deleted)
        return json_reply({"id": deleted, "object": "model", "deleted": True})

    return routes


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
        "tags": list(info.tags),
        "private": info.is_private,
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


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            picture = file.read(_MAX_PICTURE_BYTES + 1)
    except FileNotFoundError as exc:
        raise ModelNotFound("The model has just been deleted.", param="model") from exc
    if len(picture) > _MAX_PICTURE_BYTES:
        raise ModelNotFound(
            f"The model's picture has more than {_MAX_PICTURE_BYTES} bytes, the most that is shown.", param="model"
        )
    return picture


def _picture_reply(picture: bytes, request: Request, caching: str) -> Response:
    etag = f'"{blake2b(picture, digest_size=16).hexdigest()}"'
    headers = {"etag": etag, "cache-control": caching, "x-content-type-options": "nosniff"}
    if is_known(request.headers.get("if-none-match"), etag):
        return Response(None, 304, headers)
    return Response(picture, 200, headers, media_type="image/png")
