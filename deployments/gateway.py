"""The replica that speaks HTTP: the API of `serve.api` over a handle to the generators.

Here, and only here, Ray's errors become ours. A request whose replica dies is sent to another one, which goes on with
the same text, because the seed was fixed here.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from typing import Any

from fastapi import FastAPI
from grpc import StatusCode  # type: ignore[import-untyped]
from grpc.aio import AioRpcError  # type: ignore[import-untyped]
from ray import serve
from ray.exceptions import RayActorError, RayError
from ray.serve.exceptions import (
    BackPressureError,
    DeploymentUnavailableError,
    RayServeException,
    ReplicaUnavailableError,
)
from ray.serve.handle import DeploymentHandle

from deployments.assignment import follow
from deployments.backlog import Backlog
from deployments.parts import open_jobs, open_metrics, read_settings, run_options
from deployments.pulse import SILENCE_S, Silence, listen
from deployments.resume import Losses, Transcript
from deployments.scrubbing import scrub_in_background
from deployments.wire import unpack
from serve.api.access import Access
from serve.api.app import build_api
from serve.api.quota import Quota
from serve.api.service import Limits
from serve.database.connection import Database
from serve.errors import ModelNotFound, Overloaded, RookeryError, StoreUnavailable
from serve.hub.opening import open_hub
from serve.keys.opening import open_keys
from serve.logs import configure, get_logger
from serve.metrics import Metrics
from serve.settings import PREFIX, BadSetting
from serve.store.opening import open_store
from serve.training.dataset import preview
from serve.training.erasure import PersonEraser
from serve.training.picture.draw import draw_preview
from serve.types import Delta, GenerationRequest, ReplicaView, TopView
from serve.usage import top_of
from serve.web.router import add_pages

log = get_logger()

_REPLICA_GONE = (RayActorError, ReplicaUnavailableError, Silence)
_CONNECTION_LOST = (StatusCode.UNAVAILABLE, StatusCode.CANCELLED, StatusCode.INTERNAL)
_RETRY_AFTER_S = 3.0  # a new replica is there after 2-4 s (2 cores, health check every 2 s)
_BROADCAST_S = 5.0


class HandleGenerator:
    """A `Generator` whose work is done by other processes; one that says nothing for `silence_s` is given up."""

    def __init__(
        self, handle: DeploymentHandle[Any], metrics: Metrics | None = None, *, silence_s: float = SILENCE_S
    ) -> None:
        self._handle, self._silence_s = handle, silence_s
        self._metrics = metrics or Metrics(enabled=False)
        self._generate = handle.options(method_name="generate", stream=True)

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[list[Delta], None]:
        """Raises: what the replica raises; Overloaded; StoreUnavailable when replicas die."""
        transcript, losses = Transcript(request), Losses()
        while True:
            with follow() as assignment:
                response = self._generate.remote(transcript.rest())
            is_over = False
            try:
                async with aclosing(listen(response, self._silence_s, assignment.when_sent)) as answers:
                    async for packed in answers:
                        if isinstance(packed, RookeryError):
                            is_over = True
                            raise _ending(packed, transcript)
                        if packed:
                            yield transcript.add(unpack(packed))
                is_over = True
                return
            except (RayError, RayServeException, AioRpcError, RuntimeError, Silence) as exc:
                is_over = not isinstance(exc, Silence)
                if not is_over:
                    assignment.give_up()
                if transcript.is_over:
                    return  # it was lost after its last word
                losses.add(was_taken=is_over or assignment.is_taken, num_tokens=transcript.num_tokens)
                if losses.are_too_many or not is_gone(exc):
                    raise _ending(exc, transcript) from exc
                self._note_resumed(transcript, exc)
            finally:
                if not is_over:
                    response.cancel()  # the caller left, or nobody answers

    async def replicas(self) -> list[ReplicaView]:
        found: list[ReplicaView] = [view for views in await self._ask_all("replicas") for view in views]
        return sorted(found, key=lambda view: view.name)

    async def top(self, limit: int) -> TopView:
        return top_of(await self._ask_all("usage"), limit)

    async def forget(self, model_id: str, *, at_once: bool = False) -> None:
        await self._ask_all("forget", model_id, at_once)

    async def check_ready(self) -> None:
        try:
            async with asyncio.timeout(self._silence_s):
                await self._handle.check_ready.remote()
        except Exception as exc:
            raise translate(exc) from exc

    def _note_resumed(self, transcript: Transcript, error: Exception) -> None:
        request, num_tokens = transcript.request, transcript.num_tokens
        had = "nothing" if not num_tokens else "whole" if request.is_whole else "stream"
        self._metrics.generations_resumed.labels(had).inc()
        log.warning(
            "generation_resumed",
            request_id=request.request_id,
            error=type(error).__name__,
            had=had,
            tokens=num_tokens,
        )

    async def _ask_all(self, method: str, *args: Any) -> list[Any]:
        """What the replicas answer; one that has died in the meantime has nothing to tell or to forget."""
        try:
            response = self._handle.broadcast(method, *args)
            answers = await response.results_async(timeout_s=_BROADCAST_S, return_exceptions=True)
        except Exception as exc:
            raise translate(exc) from exc
        for answer in answers:
            if isinstance(answer, Exception) and not is_gone(answer):
                raise translate(answer) from answer
        return [answer for answer in answers if not isinstance(answer, Exception)]


class Gateway:
    """Ray Serve's ingress: builds the FastAPI application when the replica starts."""

    def __init__(
        self, overrides: Mapping[str, str], generator: DeploymentHandle[Any], trainer: object, needs_keys: bool = False
    ) -> None:
        # `trainer` is not called: jobs reach it through the database. Binding it makes it part of the application.
        self._settings = read_settings(overrides)
        self._keys = open_keys(self._settings)
        if needs_keys and not self._keys.are_needed:
            raise BadSetting(
                f"There is no key, neither in {PREFIX}API_KEYS nor in the database, and without one everybody could do "
                "everything here, private bots included: make one by 'rookery keys create --scopes admin', or set "
                f"{PREFIX}API_KEYS in the gateway's environment (in Kubernetes in the Secret 'rookery'), or set "
                "needs_keys: false in the application's args."
            )
        configure(self._settings, part="gateway", replica=serve.get_replica_context().replica_id.unique_id)
        self._handle = generator
        self._backlog: Backlog | None = None

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """Ray asks every few seconds, where it may change the number of gateways or of trainers."""
        return await self._backlog.stats() if self._backlog else {}

    def __serve_build_asgi_app__(self) -> FastAPI:  # Ray's name for it
        jobs, store, metrics = open_jobs(self._settings), open_store(self._settings), open_metrics(self._settings)
        generator = HandleGenerator(self._handle, metrics)
        store.describe_in_background()
        hub = open_hub(self._settings, store, metrics) if self._settings.hub_enabled else None
        scrub_in_background(self._settings, store, hub, generator, metrics)
        self._backlog = Backlog(jobs, metrics)
        return build_api(
            generator=generator,
            catalogue=store,
            files=jobs,
            jobs=jobs,
            upload_dir=run_options(self._settings).uploads,
            default_base=self._settings.base,
            metrics=metrics,
            limits=Limits(generate_s=self._settings.deadline_s),
            preview=preview,
            draw_preview=draw_preview,
            add_pages=add_pages,
            puller=hub,
            eraser=PersonEraser(store, Database(self._settings.sql_url), run_options(self._settings)),
            access=Access.from_settings(
                self._keys.follow(), hosts=self._settings.hosts, anonymous=self._settings.anonymous, metrics=metrics
            ),
            quota=Quota.from_settings(self._settings, metrics),
            sends_request_id=False,  # Ray Serve does
        )


def is_gone(error: Exception) -> bool:
    """Whether it tells of a replica that has died or cannot be reached, not of one that refuses.

    Calls are by gRPC, and only its most common words for that become errors of Ray's.
    """
    if isinstance(error, AioRpcError):
        return error.code() in _CONNECTION_LOST
    if type(error) is RuntimeError:  # Ray's own, of a connection that was lost between a request and its acceptance
        return str(error).startswith("Unexpected error (StatusCode.")
    return isinstance(error, _REPLICA_GONE)


def _ending(error: Exception, transcript: Transcript) -> Exception:
    """How a generation ends that nobody can go on with."""
    known = translate(error)
    if isinstance(known, ModelNotFound) and transcript.num_tokens:  # to ask again is to ask the newest revision
        return StoreUnavailable(
            "The generator that was writing this text has stopped, and its model has been replaced or deleted since; "
            "ask for it again.",
            retry_after_s=1.0,
        )
    return known


def translate(error: Exception) -> Exception:
    """The error as the rest of the program knows it; one of a kind nobody foresaw comes back unchanged."""
    cause = getattr(error, "cause", None)  # of a RayTaskError: what the replica raised
    if isinstance(cause, RookeryError):
        return cause
    if isinstance(error, RookeryError):
        return error
    if isinstance(error, BackPressureError):
        return Overloaded("All generators are busy and their queues are full; try again soon.", retry_after_s=1.0)
    if is_gone(error):
        return StoreUnavailable(
            "The generator that was writing this text has stopped; try again.", retry_after_s=_RETRY_AFTER_S
        )
    if isinstance(error, DeploymentUnavailableError | TimeoutError):
        return StoreUnavailable("No generator answers now; try again soon.", retry_after_s=_RETRY_AFTER_S)
    return error
