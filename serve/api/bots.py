"""The one-call ways with archives: look at what a bot would learn from, and make one.

Both are forms with one or more files named `archive`. No file outlives the request, or the job that it came for.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import anyio
import anyio.to_thread
from fastapi import APIRouter, Request
from pydantic import ValidationError
from starlette.responses import Response

from serve.api.body import Form, Part, read_form
from serve.api.described import takes_form
from serve.api.files import stage
from serve.api.fine_tuning import job_json
from serve.api.job_request import BotForm, bare, from_form, read_idempotency_key
from serve.api.quota import allowance
from serve.api.service import Service
from serve.api.status import invalid, json_reply
from serve.api.storage import room_of
from serve.errors import BadUpload
from serve.types import BOT_PURPOSE, MAX_ARCHIVES, Job, Scope

_MAX_PREVIEWS = 2  # at once: reading archives takes a core each, and streams of texts need the rest

_HANDLES = {"handle": {"type": "array", "items": {"type": "string"}}}
_BOT = takes_form(BotForm, files={"archive": "many", "validation": "maybe"}, more=_HANDLES)


def router(service: Service) -> APIRouter:
    """/v1/bots and /v1/archives/preview."""
    routes = APIRouter(prefix="/v1")
    access = service.access

    @routes.post("/bots", status_code=201, openapi_extra=_BOT, dependencies=access.needs(Scope.TRAIN))
    async def create_bot(request: Request) -> Response:
        """Archives in, a training job out."""
        key, caller = read_idempotency_key(request), access.caller(request)
        async with read_form(request, service) as form:
            wanted = _read_bot(form)
            archives = [stage(service, request, part, BOT_PURPOSE) for part in _archives(form)]
            validation = [stage(service, request, part, BOT_PURPOSE) for part in _validation(form)]
            job_request = from_form(
                wanted,
                [file.id for file in archives],
                validation=validation[0].id if validation else None,
                default_base=service.default_base,
                caller=caller,
            )

            def create() -> Job:
                return service.jobs.create_job(
                    job_request,
                    idempotency_key=key,
                    max_open=allowance(request).limits.jobs,
                    staged=[*archives, *validation],
                    check_room=room_of(service, request),
                )

            return json_reply(job_json(await anyio.to_thread.run_sync(create)), 201)

    if (preview := service.preview) is not None:
        limiter = anyio.CapacityLimiter(_MAX_PREVIEWS)

        @routes.post(
            "/archives/preview",
            openapi_extra=takes_form(files={"archive": "many"}, more=_HANDLES),
            dependencies=access.needs(Scope.TRAIN),
        )
        async def preview_archives(request: Request) -> Response:
            """Archives in, what a bot would learn from out; nothing is kept."""
            async with read_form(request, service, keeps=False) as form:
                parts = _archives(form)
                paths = [part.path for part in parts if part.path is not None]
                names = [part.filename or "upload" for part in parts]  # they may tell a format
                look = partial(preview, paths, [bare(handle) for handle in _handles(form)], filenames=names)
                return json_reply(await anyio.to_thread.run_sync(look, limiter=limiter))

    return routes


def _archives(form: Form) -> list[Part]:
    parts = form.files("archive")
    if not 1 <= len(parts) <= MAX_ARCHIVES:
        raise BadUpload(f"Send 1 to {MAX_ARCHIVES} parts named 'archive', not {len(parts)}.", param="archive")
    return parts


def _validation(form: Form) -> list[Part]:
    parts = form.files("validation")
    if len(parts) > 1:
        raise BadUpload(f"Send at most one part named 'validation', not {len(parts)}.", param="validation")
    return parts


def _handles(form: Form) -> list[str]:
    """Whose the first archives are, in order."""
    num_archives, handles = len(_archives(form)), form.values("handle")
    if len(handles) > num_archives:
        raise BadUpload(
            f"There are {len(handles)} 'handle' fields for {num_archives} archives; send one for each, in order.",
            param="handle",
        )
    return handles


def _read_bot(form: Form) -> BotForm:
    given: dict[str, Any] = {name: form.value(name) for name in BotForm.model_fields}
    metadata = {
        part.name.removeprefix("metadata[").removesuffix("]"): part.value
        for part in form.parts
        if part.name.startswith("metadata[") and part.name.endswith("]") and part.path is None
    }
    try:
        return BotForm.model_validate({**given, "handle": _handles(form), "metadata": metadata or None}, strict=False)
    except ValidationError as exc:
        raise invalid(exc) from exc
