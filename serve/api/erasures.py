"""Forgetting a person: POST /v1/erasures takes away all that is here of them, GET tells how far that is.

Of everybody's by who sees that, else of the caller's tenant; what others have changes no answer. It goes on when
whoever asked has left, and one that was cut off, with its gateway, is taken up by another.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from functools import partial
from typing import Annotated, Any, ParamSpec, TypeVar

import anyio
import anyio.to_thread
from fastapi import APIRouter, Request
from pydantic import Field
from starlette.responses import Response

from serve.api.body import Body, read_json
from serve.api.described import takes
from serve.api.lists import PathId
from serve.api.service import Service
from serve.api.status import json_reply
from serve.errors import Conflict, Overloaded, RookeryError, StoreUnavailable
from serve.logs import get_logger
from serve.types import Belongings, Eraser, Erasure, Scope

log = get_logger()

_P = ParamSpec("_P")
_T = TypeVar("_T")

BEAT_S = 20.0  # of an erasure that goes on; also how often those are looked for that have gone silent
_MAX_WAITING = 16  # to look for what is here of a person, and to have it erased: each takes its turn
_RETRY_AFTER_S = 10.0

_Handle = Annotated[str, Field(min_length=1, max_length=128)]


class ErasureBody(Body):
    handle: _Handle
    dry_run: bool = False  # only tells what would go


class LiftBody(Body):
    handle: _Handle


def router(service: Service) -> APIRouter:
    """/v1/erasures."""
    access, running = service.access, _Running(service)
    routes = APIRouter(prefix="/v1/erasures", lifespan=running.lifespan)

    @routes.post("", openapi_extra=takes(ErasureBody), dependencies=access.needs(Scope.TRAIN, with_key=True))
    async def erase(request: Request) -> Response:
        body = await read_json(request, ErasureBody, service)
        eraser, caller = _eraser(service), access.caller(request)
        found = await running.looking(eraser.find, body.handle, caller.viewer)
        begun = Erasure(
            id=f"erasure-{secrets.token_hex(12)}",
            person=_person(body.handle),
            status="running",
            started_at=int(time.time()),
            models=found.models,
            jobs=found.jobs,
            files=found.files,
            by=caller.name,
            viewer=caller.viewer,
        )
        if body.dry_run:
            return json_reply({**erasure_json(begun), "id": None, "status": "dry_run"})
        await running.begin(eraser, begun)
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


class _Turns:
    """One call at a time in a thread of its own: none of those that all other requests use."""

    def __init__(self) -> None:
        self._limiter = anyio.CapacityLimiter(1)
        self._num_callers = 0

    async def __call__(self, call: Callable[_P, _T], *arguments: _P.args, **named: _P.kwargs) -> _T:
        """Raises: Overloaded, and whatever the call does."""
        if self._num_callers > _MAX_WAITING:
            raise _many()
        self._num_callers += 1
        try:
            return await anyio.to_thread.run_sync(partial(call, *arguments, **named), limiter=self._limiter)
        finally:
            self._num_callers -= 1


class _Running:
    """The erasures that this gateway works on."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._tasks: set[asyncio.Task[None]] = set()
        self.looking, self._erasing = _Turns(), anyio.CapacityLimiter(1)

    async def begin(self, eraser: Eraser, erasure: Erasure) -> None:
        """Returns when nothing of the person can come in or be used any more. Raises: Overloaded, StoreUnavailable."""
        if len(self._tasks) >= _MAX_WAITING:
            raise _many()
        await anyio.to_thread.run_sync(eraser.save, erasure)
        try:
            begun = await self.looking(eraser.begin, erasure.person, erasure.by, erasure.viewer)
        except Exception as exc:
            await self._end(eraser, _failed(erasure, exc))
            raise
        self._go_on(eraser, erasure, erasure.found | begun)

    def _go_on(self, eraser: Eraser, erasure: Erasure, begun: Belongings) -> None:
        task = asyncio.create_task(self._run(eraser, erasure, begun))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    @asynccontextmanager
    async def lifespan(self, _: object) -> AsyncIterator[None]:
        """While the server runs, it takes up what others had to leave."""
        eraser = self._service.eraser
        task = asyncio.create_task(self._take_up(eraser)) if eraser else None
        yield
        if task:
            task.cancel()

    async def _take_up(self, eraser: Eraser) -> None:
        while True:
            try:
                for erasure in await anyio.to_thread.run_sync(eraser.take_up):
                    log.info("erasure_taken_up", erasure_id=erasure.id)
                    self._go_on(eraser, erasure, erasure.found)
            except Exception:
                log.exception("erasures_not_taken_up")
            await asyncio.sleep(BEAT_S)

    async def _run(self, eraser: Eraser, erasure: Erasure, begun: Belongings) -> None:
        beating = asyncio.create_task(_beat(eraser, erasure.id))
        try:
            done = await self._erase(eraser, erasure, begun)
        except Exception as exc:
            log.exception("erasure_failed", erasure_id=erasure.id)
            done = _failed(erasure, exc)
        finally:
            beating.cancel()
        await self._end(eraser, done)

    async def _end(self, eraser: Eraser, done: Erasure) -> None:
        await anyio.to_thread.run_sync(eraser.save, replace(done, finished_at=int(time.time())))
        log.info("erasure_ended", erasure_id=done.id, status=done.status, models=len(done.models))

    async def _erase(self, eraser: Eraser, erasure: Erasure, begun: Belongings) -> Erasure:
        in_memory = await self._forget(begun.models)
        removed = await anyio.to_thread.run_sync(
            eraser.finish, erasure.person, begun, erasure.by, erasure.viewer, limiter=self._erasing
        )
        # Again: one may have been loaded, or copied, until its files went.
        await self._forget(removed.what.models)
        left = await self._in_memory(removed.what.models)
        unreached = [*removed.unreached, *[f"{name} still has a model of it in memory." for name in left or {}]]
        if left is None:
            unreached.append("The generators do not answer: what they have in memory is used no more, but is there.")
        return replace(
            erasure,
            status="failed" if removed.message else "done",
            message=removed.message,
            models=removed.what.models,
            jobs=removed.what.jobs,
            files=removed.what.files,
            tiers=removed.tiers,
            generators=in_memory,
            unreached=tuple(unreached),
        )

    async def _forget(self, model_ids: Iterable[str]) -> Mapping[str, int]:
        """What generators had of them. One that cannot be told keeps nothing from going: each asks before each text."""
        in_memory = await self._in_memory(model_ids)
        for model_id in model_ids:
            with suppress(StoreUnavailable):
                await self._service.generator.forget(model_id, at_once=True)
        return in_memory or {}

    async def _in_memory(self, model_ids: Iterable[str]) -> dict[str, int] | None:
        """Name of a generator -> bytes of these models that it has. None where that cannot be told."""
        wanted, found = {model_id.lower() for model_id in model_ids}, Counter[str]()
        try:
            views = await self._service.generator.replicas()
        except StoreUnavailable:
            return None
        for view in views:
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


async def _beat(eraser: Eraser, erasure_id: str) -> None:
    while True:
        await asyncio.sleep(BEAT_S)
        with suppress(StoreUnavailable):
            await anyio.to_thread.run_sync(eraser.beat, erasure_id)


def _many() -> Overloaded:
    return Overloaded("Many erasures are under way; try again soon.", retry_after_s=_RETRY_AFTER_S)


def _failed(erasure: Erasure, exc: Exception) -> Erasure:
    message = exc.message if isinstance(exc, RookeryError) else "The server failed; its log says why."
    return replace(erasure, status="failed", message=message)


def _person(handle: str) -> str:
    return "@" + handle.strip().removeprefix("@").lower()


def _eraser(service: Service) -> Eraser:
    if service.eraser is None:
        raise Conflict("Nobody can be erased here: this server keeps no jobs.")
    return service.eraser
