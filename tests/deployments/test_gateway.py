"""What the gateway makes of Ray's errors, without a cluster."""

from __future__ import annotations

import asyncio
import math
import pickle
import time
from collections.abc import AsyncIterator
from contextvars import copy_context
from typing import Any, cast

import pytest
from grpc import StatusCode  # type: ignore[import-untyped]
from grpc.aio import AioRpcError, Metadata  # type: ignore[import-untyped]
from ray.exceptions import ActorDiedError, ActorUnavailableError, RayTaskError
from ray.serve.exceptions import BackPressureError
from ray.serve.handle import DeploymentHandle
from ray.serve.request_router import PendingRequest, RequestRouter

from deployments.assignment import follow, note_queued, note_sent, note_taken
from deployments.gateway import Gateway, HandleGenerator, is_gone, translate
from deployments.pulse import with_pulse
from deployments.router import ModelAffinityRouter
from deployments.wire import pack
from serve.errors import ContextLengthExceeded, ModelNotFound, Overloaded, RookeryError, StoreUnavailable
from serve.settings import BadSetting
from serve.types import Delta, GenerationRequest

HANGS = None  # in a script: from here on nothing comes any more
QUEUED = "queued"  # in a script: no replica has a place yet
WORKS = "works"  # in a script: a replica is busy with it, and lets that be heard
SILENCE_S = 0.05


@pytest.mark.parametrize("error", [ModelNotFound("gone", param="model"), ContextLengthExceeded("long", param="prompt")])
def test_an_error_raised_in_a_replica_is_the_same_error_in_the_gateway(error: RookeryError) -> None:
    from_ray = pickle.loads(pickle.dumps(RayTaskError("generate", "Traceback ...", error))).as_instanceof_cause()
    translated = translate(from_ray)
    assert type(translated) is type(error)
    assert (str(translated), translated.param) == (error.message, error.param)


def test_full_queues_are_an_overload() -> None:
    error = translate(BackPressureError(64, 64))
    assert isinstance(error, Overloaded)
    assert error.retry_after_s


@pytest.mark.parametrize("error", [ActorDiedError(), ActorUnavailableError("gone", b"0" * 16)])
def test_a_dead_replica_is_a_matter_of_seconds(error: Exception) -> None:
    translated = translate(error)
    assert isinstance(translated, StoreUnavailable)
    assert translated.retry_after_s


def test_an_error_nobody_foresaw_is_left_as_it_is() -> None:
    error = KeyError("oops")
    assert translate(error) is error


# --- What becomes of a text whose replica is lost -------------------------------------------------------------


class Replicas:
    """A handle whose calls go, one after another, to replicas that each follow a script."""

    def __init__(self, *scripts: list[str | Exception | None]) -> None:
        self.scripts = list(scripts)
        self.num_cancelled = 0

    def options(self, **_: object) -> Replicas:
        return self

    def remote(self, _request: GenerationRequest) -> Response:
        return Response(self, self.scripts.pop(0))


class Response:
    """What Ray gives for such a call."""

    def __init__(self, replicas: Replicas, script: list[str | Exception | None]) -> None:
        self._replicas = replicas
        self._context = copy_context()  # of the call, in which Ray's router works
        self._items = with_pulse(self._play(script), SILENCE_S / 10) if WORKS in script else self._play(script)

    async def _play(self, script: list[str | Exception | None]) -> AsyncIterator[Any]:
        self._context.run(note_sent)
        for step in script:
            if step == QUEUED:
                self._context.run(note_queued)
                await asyncio.sleep(3 * SILENCE_S)
                self._context.run(note_sent)
            elif step == WORKS:
                await asyncio.sleep(3 * SILENCE_S)
            elif step is HANGS:
                await asyncio.Event().wait()
            elif isinstance(step, Exception):
                raise step
            else:
                self._context.run(note_taken)
                yield pack([Delta(0, step)]) if step else []

    def __aiter__(self) -> Response:
        return self

    async def __anext__(self) -> Any:
        return await anext(self._items)

    def cancel(self) -> None:
        self._replicas.num_cancelled += 1


def rpc_error(code: StatusCode) -> AioRpcError:
    return AioRpcError(code, Metadata(), Metadata(), "Stream removed")


async def text_by(replicas: Replicas) -> str:
    generator = HandleGenerator(cast("DeploymentHandle[Any]", replicas), silence_s=SILENCE_S)
    request = GenerationRequest("huggingtweets/ada", ("My dream is",), {})
    return "".join([delta.text async for deltas in generator.generate(request) for delta in deltas])


LOST = [
    ActorDiedError(),
    ActorUnavailableError("gone", b"0" * 16),
    rpc_error(StatusCode.UNAVAILABLE),
    rpc_error(StatusCode.CANCELLED),
    RuntimeError("Unexpected error (StatusCode.UNAVAILABLE): Socket closed."),
]


@pytest.mark.parametrize("error", LOST)
@pytest.mark.parametrize("before", [[], ["My "], ["My ", "dream "]])
async def test_a_text_goes_on_elsewhere_whatever_tells_of_the_loss(before: list[str], error: Exception) -> None:
    replicas = Replicas([*before, error], ["My ", "dream ", "is tea."])
    assert await text_by(replicas) == "My dream is tea."
    assert replicas.num_cancelled == 0


@pytest.mark.parametrize("error", LOST)
async def test_a_text_that_costs_two_replicas_gets_no_third(error: Exception) -> None:
    replicas = Replicas([error], ["My ", error], ["My dream is tea."])
    with pytest.raises(StoreUnavailable):
        await text_by(replicas)
    assert len(replicas.scripts) == 1


@pytest.mark.parametrize("before", [["My "], ["", ""], ["", "My ", "dream "]])
async def test_a_machine_that_falls_silent_is_as_good_as_dead(before: list[str]) -> None:
    replicas = Replicas([*before, HANGS], ["My ", "dream ", "is tea."])
    assert await text_by(replicas) == "My dream is tea."
    assert replicas.num_cancelled == 1


async def test_a_request_that_nobody_took_is_sent_more_often_than_one_that_cost_replicas() -> None:
    replicas = Replicas([HANGS], [HANGS], [HANGS], ["", "My dream is tea."])
    assert await text_by(replicas) == "My dream is tea."
    assert replicas.num_cancelled == 3


async def test_a_request_that_nobody_takes_is_not_sent_without_end() -> None:
    hanging: list[str | Exception | None] = [HANGS]
    replicas = Replicas(*[hanging] * 9)
    with pytest.raises(StoreUnavailable):
        await text_by(replicas)
    assert len(replicas.scripts) == 9 - replicas.num_cancelled == 5


@pytest.mark.parametrize("script", [[QUEUED, "Tea."], [QUEUED, QUEUED, QUEUED, "", "Tea."]])
async def test_who_waits_for_a_place_keeps_it_however_long(script: list[str | Exception | None]) -> None:
    replicas = Replicas(script)
    assert await text_by(replicas) == "Tea."
    assert replicas.num_cancelled == 0


async def test_a_machine_that_vanishes_as_soon_as_there_is_a_place_is_given_up() -> None:
    replicas = Replicas([QUEUED, HANGS], ["Tea."])
    assert await text_by(replicas) == "Tea."
    assert replicas.num_cancelled == 1


async def test_a_whole_text_may_take_longer_than_a_silence_and_is_written_once() -> None:
    replicas = Replicas(["My ", WORKS, "dream is tea.", WORKS])
    assert await text_by(replicas) == "My dream is tea."
    assert replicas.num_cancelled == 0


async def test_rays_router_tells_when_a_request_leaves_its_queue(monkeypatch: pytest.MonkeyPatch) -> None:
    has_place = asyncio.Event()

    async def wait(*_: object, **__: object) -> str:
        await has_place.wait()
        return "replica"

    monkeypatch.setattr(RequestRouter, "_choose_replica_for_request", wait)  # what Ray calls: of 2.60
    router = object.__new__(ModelAffinityRouter)
    with follow() as assignment:
        choosing = asyncio.create_task(router._choose_replica_for_request(cast("PendingRequest", None)))
    await asyncio.sleep(0)
    assert assignment.when_sent() == math.inf
    has_place.set()
    assert cast("str", await choosing) == "replica"
    assert assignment.when_sent() <= time.monotonic()


@pytest.mark.parametrize("keys", ["", " , "])
def test_a_gateway_that_needs_keys_does_not_start_without(keys: str) -> None:
    with pytest.raises(BadSetting, match="ROOKERY_API_KEYS names no key.*rookery keys new"):
        Gateway.__init__(object.__new__(Gateway), {"ROOKERY_API_KEYS": keys}, cast("Any", None), None, True)


async def test_what_a_replica_refuses_is_asked_of_no_other() -> None:
    replicas = Replicas([RayTaskError("generate", "Traceback ...", ModelNotFound("gone")).as_instanceof_cause()])
    with pytest.raises(ModelNotFound):
        await text_by(replicas)


@pytest.mark.parametrize("code", [StatusCode.RESOURCE_EXHAUSTED, StatusCode.UNAUTHENTICATED, StatusCode.UNKNOWN])
def test_a_call_that_fails_everywhere_alike_is_no_loss(code: StatusCode) -> None:
    assert not is_gone(rpc_error(code))
