"""The replica that speaks HTTP: the API of `serve.api` over a handle to the generators.

Here, and only here, Ray's errors become ours. A request whose replica dies is sent to another one, which writes
the same text again, because the seed was fixed here.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Iterable, Mapping
from functools import partial
from typing import Any

from fastapi import FastAPI
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector
from ray.exceptions import RayActorError, RayTaskError
from ray.serve.exceptions import (
    BackPressureError,
    DeploymentUnavailableError,
    RayServeException,
    ReplicaUnavailableError,
)
from ray.serve.handle import DeploymentHandle

from deployments.parts import open_jobs, read_settings, run_options
from deployments.replay import Transcript
from deployments.wire import unpack
from serve.api.access import Access
from serve.api.app import build_api
from serve.errors import Overloaded, RookeryError, StoreUnavailable
from serve.hub.opening import open_hub
from serve.metrics import Metrics
from serve.store.opening import open_store
from serve.training.dataset import preview
from serve.training.picture.draw import draw_preview
from serve.types import Delta, GenerationRequest, ReplicaView
from serve.web.router import add_pages

log = logging.getLogger(__name__)

_REPLICA_GONE = (RayActorError, ReplicaUnavailableError)
_MAX_TRIES = 2
_RETRY_AFTER_S = 3.0  # a new replica is there after 2-4 s (2 cores, health check every 2 s)
_BROADCAST_S = 5.0


class HandleGenerator:
    """A `Generator` whose work is done by other processes."""

    def __init__(self, handle: DeploymentHandle[Any]) -> None:
        self._handle = handle
        self._generate = handle.options(method_name="generate", stream=True)

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[list[Delta], None]:
        """Raises: what the replica raises; Overloaded; StoreUnavailable when replicas die."""
        transcript = Transcript()
        for attempt in range(1, _MAX_TRIES + 1):
            transcript.restart()
            response = self._generate.remote(request)
            is_over = False
            try:
                async for packed in response:
                    if fresh := transcript.news(unpack(packed)):
                        yield fresh
                is_over = True
                return
            except _REPLICA_GONE as exc:
                is_over = True
                if attempt == _MAX_TRIES:
                    raise translate(exc) from exc
                log.warning("generation_retried request_id=%s reason=%s", request.request_id, type(exc).__name__)
            except (RayTaskError, RayServeException) as exc:
                is_over = True
                raise translate(exc) from exc
            finally:
                if not is_over:
                    response.cancel()  # the caller left

    async def replicas(self) -> list[ReplicaView]:
        found: list[ReplicaView] = [view for views in await self._ask_all("replicas") for view in views]
        return sorted(found, key=lambda view: view.name)

    async def forget(self, model_id: str) -> None:
        await self._ask_all("forget", model_id)

    async def check_ready(self) -> None:
        try:
            await self._handle.check_ready.remote()
        except Exception as exc:
            raise translate(exc) from exc

    async def metrics_text(self, own: Metrics) -> str:
        """The expositions of all replicas as one, with what the gateway's `own` share with theirs."""
        texts: dict[str, str] = dict(await self._ask_all("metrics_text"))
        return join_expositions({**texts, "gateway": own.render_shared()})

    async def _ask_all(self, method: str, *args: Any) -> list[Any]:
        """What the replicas answer; one that has died in the meantime has nothing to tell or to forget."""
        try:
            response = self._handle.broadcast(method, *args)
            answers = await response.results_async(timeout_s=_BROADCAST_S, return_exceptions=True)
        except Exception as exc:
            raise translate(exc) from exc
        for answer in answers:
            if isinstance(answer, Exception) and not isinstance(answer, _REPLICA_GONE):
                raise translate(answer) from answer
        return [answer for answer in answers if not isinstance(answer, Exception)]


class Gateway:
    """Ray Serve's ingress: builds the FastAPI application when the replica starts."""

    def __init__(self, overrides: Mapping[str, str], generator: DeploymentHandle[Any], trainer: object) -> None:
        # `trainer` is not called: jobs reach it through the database. Binding it makes it part of the application.
        self._settings = read_settings(overrides)
        self._generator = HandleGenerator(generator)

    def __serve_build_asgi_app__(self) -> FastAPI:  # Ray's name for it
        jobs, store, metrics = open_jobs(self._settings), open_store(self._settings), Metrics(part="api")
        store.describe_in_background()
        return build_api(
            generator=self._generator,
            catalogue=store,
            files=jobs,
            jobs=jobs,
            upload_dir=run_options(self._settings).uploads,
            default_base=self._settings.base,
            metrics=metrics,
            extra_metrics=partial(self._generator.metrics_text, metrics),
            preview=preview,
            draw_preview=draw_preview,
            add_pages=add_pages,
            puller=open_hub(self._settings, store, metrics) if self._settings.hub_enabled else None,
            access=Access.from_setting(self._settings.api_keys, self._settings.hosts),
            sends_request_id=False,  # Ray Serve does
        )


def translate(error: Exception) -> Exception:
    """The error as the rest of the program knows it; one of a kind nobody foresaw comes back unchanged."""
    cause = getattr(error, "cause", None)  # of a RayTaskError: what the replica raised
    if isinstance(cause, RookeryError):
        return cause
    if isinstance(error, RookeryError):
        return error
    if isinstance(error, BackPressureError):
        return Overloaded("All generators are busy and their queues are full; try again soon.", retry_after_s=1.0)
    if isinstance(error, _REPLICA_GONE):
        return StoreUnavailable(
            "The generator that was writing this text has stopped; try again.", retry_after_s=_RETRY_AFTER_S
        )
    if isinstance(error, DeploymentUnavailableError | TimeoutError):
        return StoreUnavailable("No generator answers now; try again soon.", retry_after_s=_RETRY_AFTER_S)
    return error


def join_expositions(texts: Mapping[str, str]) -> str:
    """One Prometheus exposition of many processes': each sample names its replica."""
    joined: dict[str, Metric] = {}
    for replica, text in texts.items():
        for family in text_string_to_metric_families(text):
            metric = joined.setdefault(family.name, Metric(family.name, family.documentation, family.type))
            for sample in family.samples:
                metric.add_sample(sample.name, {**sample.labels, "replica": replica}, sample.value)
    registry = CollectorRegistry()
    registry.register(_Families(joined.values()))
    return generate_latest(registry).decode()


class _Families(Collector):
    def __init__(self, families: Iterable[Metric]) -> None:
        self._families = list(families)

    def collect(self) -> Iterable[Metric]:
        return self._families
