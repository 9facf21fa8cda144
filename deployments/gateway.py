"""The replica that speaks HTTP: the API of `serve.api` over a handle to the generators.

Here, and only here, Ray's errors become ours. A request whose replica dies is sent to another one, which writes
the same text again, because the seed was fixed here.
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
from deployments.replay import Transcript
from deployments.wire import unpack
from serve.api.access import Access
from serve.api.app import build_api
from serve.errors import Overloaded, RookeryError, StoreUnavailable
from serve.hub.opening import open_hub
from serve.logs import configure, get_logger
from serve.settings import PREFIX, BadSetting
from serve.store.opening import open_store
from serve.training.dataset import preview
from serve.training.picture.draw import draw_preview
from serve.types import Delta, GenerationRequest, ReplicaView, TopView
from serve.usage import top_of
from serve.web.router import add_pages

log = get_logger()

_REPLICA_GONE = (RayActorError, ReplicaUnavailableError, Silence)
_CONNECTION_LOST = (StatusCode.UNAVAILABLE, StatusCode.CANCELLED, StatusCode.INTERNAL)
_MAX_DEATHS = 2  # of replicas that had taken the same request
_MAX_TRIES = 4  # who does not take it was gone before it came; Ray knows of that after some 12 s, less than a silence
_RETRY_AFTER_S = 3.0  # a new replica is there after 2-4 s (2 cores, health check every 2 s)
_BROADCAST_S = 5.0


class HandleGenerator:
    """A `Generator` whose work is done by other processes; one that says nothing for `silence_s` is given up."""

    def __init__(self, handle: DeploymentHandle[Any], silence_s: float = SILENCE_S) -> None:
        self._handle, self._silence_s = handle, silence_s
        self._generate = handle.options(method_name="generate", stream=True)

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[list[Delta], None]:
        """Raises: what the replica raises; Overloaded; StoreUnavailable when replicas die."""
        transcript, num_tries, num_deaths = Transcript(), 0, 0
        while True:
            transcript.restart()
            with follow() as assignment:
                response = self._generate.remote(request)
            is_over = False
            try:
                async with aclosing(listen(response, self._silence_s, assignment.when_sent)) as answers:
                    async for packed in answers:
                        if fresh := transcript.news(unpack(packed)):
                            yield fresh
                is_over = True
                return
            except (RayError, RayServeException, AioRpcError, RuntimeError, Silence) as exc:
                is_over = not isinstance(exc, Silence)
                num_tries += 1
                num_deaths += is_over or assignment.is_taken
                if num_deaths == _MAX_DEATHS or num_tries == _MAX_TRIES or not is_gone(exc):
                    raise translate(exc) from exc
                log.warning("generation_retried", request_id=request.request_id, error=type(exc).__name__)
            finally:
                if not is_over:
                    response.cancel()  # the caller left, or nobody answers

    async def replicas(self) -> list[ReplicaView]:
        found: list[ReplicaView] = [view for views in await self._ask_all("replicas") for view in views]
        return sorted(found, key=lambda view: view.name)

    async def top(self, limit: int) -> TopView:
        return top_of(await self._ask_all("usage"), limit)

    async def forget(self, model_id: str) -> None:
        await self._ask_all("forget", model_id)

    async def check_ready(self) -> None:
        try:
            async with asyncio.timeout(self._silence_s):
                await self._handle.check_ready.remote()
        except Exception as exc:
            raise translate(exc) from exc

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
        if needs_keys and not Access.from_setting(self._settings.api_keys).needs_keys:
            raise BadSetting(
                f"{PREFIX}API_KEYS names no key, and without one everybody could do everything here, private bots "
                "included: make a key by 'rookery keys new' and set it in the gateway's environment (in Kubernetes "
                "in the Secret 'rookery'), or set needs_keys: false in the application's args."
            )
        configure(self._settings, part="gateway", replica=serve.get_replica_context().replica_id.unique_id)
        self._generator = HandleGenerator(generator)
        self._backlog: Backlog | None = None

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """Ray asks every few seconds, where it may change the number of gateways or of trainers."""
        return await self._backlog.stats() if self._backlog else {}

    def __serve_build_asgi_app__(self) -> FastAPI:  # Ray's name for it
        jobs, store, metrics = open_jobs(self._settings), open_store(self._settings), open_metrics(self._settings)
        store.describe_in_background()
        self._backlog = Backlog(jobs, metrics)
        return build_api(
            generator=self._generator,
            catalogue=store,
            files=jobs,
            jobs=jobs,
            upload_dir=run_options(self._settings).uploads,
            default_base=self._settings.base,
            metrics=metrics,
            preview=preview,
            draw_preview=draw_preview,
            add_pages=add_pages,
            puller=open_hub(self._settings, store, metrics) if self._settings.hub_enabled else None,
            access=Access.from_setting(self._settings.api_keys, self._settings.hosts, metrics),
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
