"""OpenAI's files: archives of tweets on their way to a training job."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import anyio.to_thread
from fastapi import APIRouter, Query, Request
from starlette.responses import FileResponse, Response

from serve.api.body import Part, read_form
from serve.api.described import answers, takes_form
from serve.api.lists import After, PathId, as_list
from serve.api.service import Service
from serve.api.status import json_reply
from serve.api.storage import room_of
from serve.errors import BadUpload, InvalidRequest
from serve.types import TRAINING_PURPOSE, FileRecord, Scope

_PURPOSE = {"purpose": {"const": TRAINING_PURPOSE}}


def router(service: Service) -> APIRouter:
    """/v1/files."""
    routes = APIRouter(prefix="/v1/files")
    access, files = service.access, service.files
    reads, changes = access.needs(Scope.READ, with_key=True), access.needs(Scope.TRAIN)

    async def find(request: Request, file_id: str) -> FileRecord:
        """The caller's. Raises: NotFound."""
        return await anyio.to_thread.run_sync(files.get_file, file_id, access.caller(request).viewer)

    @routes.post("", dependencies=changes, openapi_extra=takes_form(files={"file": "one"}, more=_PURPOSE))
    async def create_file(request: Request) -> Response:
        async with read_form(request, service) as form:
            if (form.value("purpose") or TRAINING_PURPOSE) != TRAINING_PURPOSE:
                raise InvalidRequest(f"'purpose' must be '{TRAINING_PURPOSE}', the only one there is.", param="purpose")
            parts = form.files("file")
            if len(parts) != 1:
                raise BadUpload(f"Send exactly one part named 'file', not {len(parts)}.", param="file")
            staged = stage(service, request, parts[0])

            def keep() -> FileRecord:
                return files.keep_files([staged], check_room=room_of(service, request))[0]

            return json_reply(file_json(await anyio.to_thread.run_sync(keep)))

    @routes.get("", dependencies=reads)
    async def list_files(
        request: Request,
        limit: Annotated[int, Query(ge=1, le=10_000)] = 1000,
        after: After = None,
        purpose: Annotated[str | None, Query(max_length=64, pattern="^[!-~]*$")] = None,
        order: Literal["asc", "desc"] = "desc",
    ) -> Response:
        def read() -> dict[str, Any]:
            asked: dict[str, Any] = {"purpose": purpose, "newest_first": order == "desc"}
            page = files.list_files(limit=limit, after=after, viewer=access.caller(request).viewer, **asked)
            return as_list([file_json(record) for record in page.items], page.has_more)

        return json_reply(await anyio.to_thread.run_sync(read))

    @routes.get("/{file_id}", dependencies=reads)
    async def retrieve_file(file_id: PathId, request: Request) -> Response:
        return json_reply(file_json(await find(request, file_id)))

    @routes.get("/{file_id}/content", dependencies=reads, responses=answers("application/octet-stream"))
    async def read_content(file_id: PathId, request: Request) -> Response:
        record = await find(request, file_id)
        return FileResponse(record.path, media_type="application/octet-stream", filename=record.filename)

    @routes.delete("/{file_id}", dependencies=changes)
    async def delete_file(file_id: PathId, request: Request) -> Response:
        await find(request, file_id)
        await anyio.to_thread.run_sync(files.delete_file, file_id)
        return json_reply({"id": file_id, "object": "file", "deleted": True})

    return routes


def stage(service: Service, request: Request, part: Part, purpose: str = TRAINING_PURPOSE) -> FileRecord:
    """An uploaded part as the caller's file, to be looked at before it is kept. Raises: BadUpload when it is empty."""
    assert part.path is not None
    owner = service.access.caller(request).tenant
    staged = service.files.stage_file(part.path, part.filename or "upload", purpose, owner)
    if staged.num_bytes == 0:
        raise BadUpload("The file is empty (0 bytes): choose the one that you downloaded.", param=part.name)
    return staged


def file_json(record: FileRecord) -> dict[str, Any]:
    """OpenAI's file object."""
    return {
        "id": record.id,
        "object": "file",
        "bytes": record.num_bytes,
        "created_at": record.created_at,
        "filename": record.filename,
        "purpose": record.purpose,
        "status": "processed",
    }
