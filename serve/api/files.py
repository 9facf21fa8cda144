"""OpenAI's files: archives of tweets on their way to a training job."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import anyio.to_thread
from fastapi import APIRouter, Query, Request
from starlette.responses import FileResponse, Response

from serve.api.body import Part, read_form
from serve.api.lists import After, PathId, as_list
from serve.api.service import Service
from serve.api.status import json_reply
from serve.errors import BadUpload, InvalidRequest
from serve.types import TRAINING_PURPOSE, FileRecord


def router(service: Service) -> APIRouter:
    """/v1/files."""
    routes = APIRouter(prefix="/v1/files", dependencies=service.access.required)

    @routes.post("")
    async def create_file(request: Request) -> Response:
        async with read_form(request, service) as form:
            if (form.value("purpose") or TRAINING_PURPOSE) != TRAINING_PURPOSE:
                raise InvalidRequest(f"'purpose' must be '{TRAINING_PURPOSE}', the only one there is.", param="purpose")
            parts = form.files("file")
            if len(parts) != 1:
                raise BadUpload(f"Send exactly one part named 'file', not {len(parts)}.", param="file")
            return json_reply(file_json(await keep(service, parts[0])))

    @routes.get("")
    async def list_files(
        limit: Annotated[int, Query(ge=1, le=10_000)] = 1000,
        after: After = None,
        purpose: Annotated[str | None, Query(max_length=64, pattern="^[!-~]*$")] = None,
        order: Literal["asc", "desc"] = "desc",
    ) -> Response:
        def read() -> dict[str, Any]:
            page = service.files.list_files(limit=limit, after=after, purpose=purpose, newest_first=order == "desc")
            return as_list([file_json(record) for record in page.items], page.has_more)

        return json_reply(await anyio.to_thread.run_sync(read))

    @routes.get("/{file_id}")
    async def retrieve_file(file_id: PathId) -> Response:
        return json_reply(file_json(await anyio.to_thread.run_sync(service.files.get_file, file_id)))

    @routes.get("/{file_id}/content")
    async def read_content(file_id: PathId) -> Response:
        record = await anyio.to_thread.run_sync(service.files.get_file, file_id)
        headers = {"x-content-type-options": "nosniff"}
        return FileResponse(record.path, 200, headers, "application/octet-stream", filename=record.filename)

    @routes.delete("/{file_id}")
    async def delete_file(file_id: PathId) -> Response:
        await anyio.to_thread.run_sync(service.files.delete_file, file_id)
        return json_reply({"id": file_id, "object": "file", "deleted": True})

    return routes


async def keep(service: Service, part: Part, purpose: str = TRAINING_PURPOSE) -> FileRecord:
    """Hands an uploaded part over to Files. Raises: BadUpload when it is empty; StoreUnavailable."""

    def create() -> FileRecord:
        assert part.path is not None
        if part.path.stat().st_size == 0:
            raise BadUpload("The file is empty (0 bytes): choose the one that you downloaded.", param=part.name)
        return service.files.create_file(part.path, part.filename or "upload", purpose)

    return await anyio.to_thread.run_sync(create)


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
