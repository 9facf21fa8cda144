"""Forgetting a person: POST /v1/erasures takes away all that is here of them, GET tells how far that is.

It goes on when whoever asked has left. An erasure that was cut off, with its gateway, is asked for again: it takes what
is left.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from typing import Annotated, Any

import anyio.to_thread
from fastapi import APIRouter, Request
from pydantic import Field
from starlette.responses import Response

from serve.api.body import Body, read_json
from serve.api.described import takes
from serve.api.lists import PathId
from serve.api.service import Service
from serve.api.status import json_reply
from serve.errors import Conflict, RookeryError
from serve.logs import get_logger
from serve.types import Belongings, Eraser, Erasure, Scope

log = get_logger()

_Handle = Annotated[str, Field(min_length=1, max_length=128)]


class ErasureBody(Body):
    handle: _Handle
    dry_run: bool = False  # only tells what would go


class LiftBody(Body):
    handle: _Handle


def router(service: Service) -> APIRouter:
    """/v1/erasures."""
    routes = APIRouter(prefix="/v1/erasures")
    access, running = service.access, _Running(service)

    @routes.post("", openapi_extra=takes(ErasureBody), dependencies=access.needs(Scope.TRAIN, with_key=True))
    async def erase(request: Request) -> Response:
        body = await read_json(request, ErasureBody, service)
        eraser, caller = _eraser(service), access.caller(request)
        found = await anyio.to_thread.run_sync(eraser.find, body.handle)
        if not (found and found.may_be_erased_by(caller.viewer)):
            access.demand(request, Scope.ADMIN)
        begun = replace(_new(body.handle), models=found.models, jobs=found.jobs, files=found.files)
        if body.dry_run:
            return json_reply({**erasure_json(begun), "id": None, "status": "dry_run"})
        await running.begin(eraser, begun, caller.name)
        return json_reply(erasure_json(begun), 202, {"location": f"/v1/erasures/{begun.id}"})

    @routes.post("/lift", openapi_extra=takes(LiftBody), dependencies=access.needs(Scope.ADMIN))
    async def lift(request: Request) -> Response:
        body = await read_json(request, LiftBody, service)
        lifted = await anyio.to_thread.run_sync(_eraser(service).lift, body.handle)
        return json_reply({"object": "erasure.lift", "handle": _person(body.handle), "lifted": lifted})

    @routes.get("/{erasure_id}", dependencies=access.needs(Scope.TRAIN, with_key=True))
    async def retrieve_erasure(erasure_id: PathId) -> Response:
        """For whoever knows its id, which is not to be guessed."""
        return json_reply(erasure_json(await anyio.to_thread.run_sync(_eraser(service).load, erasure_id)))

    return routes


class _Running:
    """The erasures that this gateway works on."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._tasks: set[asyncio.Task[None]] = set()

    async def begin(self, eraser: Eraser, erasure: Erasure, by: str) -> None:
        """Returns when nothing of the person can come in or be used any more. Raises: StoreUnavailable."""
        await anyio.to_thread.run_sync(eraser.save, erasure)
        begun = await anyio.to_thread.run_sync(eraser.begin, erasure.person, by)
        task = asyncio.create_task(self._run(eraser, erasure, begun, by))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _run(self, eraser: Eraser, erasure: Erasure, begun: Belongings, by: str) -> None:
        try:
            done = await self._erase(eraser, erasure, begun, by)
        except Exception as exc:
            message = exc.message if isinstance(exc, RookeryError) else "The server failed; its log says why."
            log.exception("erasure_failed", erasure_id=erasure.id)
            done = replace(erasure, status="failed", message=message)
        await anyio.to_thread.run_sync(eraser.save, replace(done, finished_at=int(time.time())))
        log.info("erasure_ended", erasure_id=erasure.id, status=done.status, models=len(done.models))

    async def _erase(self, eraser: Eraser, erasure: Erasure, begun: Belongings, by: str) -> Erasure:
        in_memory = await self._in_memory(begun.models)
        await self._forget(begun.models)
        removed = await anyio.to_thread.run_sync(eraser.finish, erasure.person, begun, by)
        await self._forget(removed.what.models)  # again: one may have been loaded, or copied, until its files went
        unreached = [
            *removed.unreached,
            *[f"{name} still has a model of it in memory." for name in await self._in_memory(removed.what.models)],
        ]
        return replace(
            erasure,
            status="done",
            models=removed.what.models,
            jobs=removed.what.jobs,
            files=removed.what.files,
            tiers=removed.tiers,
            generators=in_memory,
            unreached=tuple(unreached),
        )

    async def _forget(self, model_ids: Iterable[str]) -> None:
        for model_id in model_ids:
            await self._service.generator.forget(model_id, at_once=True)

    async def _in_memory(self, model_ids: Iterable[str]) -> dict[str, int]:
        """Name of a generator -> bytes of these models that it has."""
        wanted, found = {model_id.lower() for model_id in model_ids}, Counter[str]()
        for view in await self._service.generator.replicas():
            for resident in view.residents:
                if resident.model_id.lower() in wanted:
                    found[view.name or "generator"] += resident.num_bytes
        return dict(found)


def erasure_json(erasure: Erasure) -> dict[str, Any]:
    """The receipt."""
    return {
        "object": "erasure",
        "id": erasure.id,
        "handle": erasure.person,
        "status": erasure.status,
        "created_at": erasure.started_at,
        "finished_at": erasure.finished_at,
        "models": list(erasure.models),
        "jobs": list(erasure.jobs),
        "files": list(erasure.files),
        "tiers": {name: {"count": share.count, "bytes": share.num_bytes} for name, share in erasure.tiers.items()},
        "generators": dict(erasure.generators),
        "unreached": list(erasure.unreached),
        "error": erasure.message or None,
    }


def _new(handle: str) -> Erasure:
    return Erasure(f"erasure-{secrets.token_hex(12)}", _person(handle), "running", int(time.time()))


def _person(handle: str) -> str:
    return "@" + handle.strip().removeprefix("@").lower()


def _eraser(service: Service) -> Eraser:
    if service.eraser is None:
        raise Conflict("Nobody can be erased here: this server keeps no jobs.")
    return service.eraser
