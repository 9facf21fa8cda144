"""What the gateway makes of Ray's errors, without a cluster."""

from __future__ import annotations

import asyncio
import math
import pickle
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextvars import copy_context
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from grpc import StatusCode  # type: ignore[import-untyped]
from grpc.aio import AioRpcError, Metadata  # type: ignore[import-untyped]
from ray.exceptions import ActorDiedError, ActorUnavailableError, RayTaskError
from ray.serve.config import DeploymentID
from ray.serve.exceptions import BackPressureError
from ray.serve.handle import DeploymentHandle
from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

from deployments.assignment import follow, is_silent, note_queued, note_replicas, note_sent, note_taken
from deployments.gateway import Gateway, HandleGenerator, is_gone, translate
from deployments.pulse import with_pulse
from deployments.router import ModelAffinityRouter
from deployments.wire import pack
from serve.errors import ContextLengthExceeded, ModelNotFound, Overloaded, RookeryError, StoreUnavailable
from serve.metrics import Metrics
from serve.settings import BadSetting
from serve.types import Delta, GenerationRequest, PromptInfo, TokenInfo, Written

HANGS = None  # in a script: from here on nothing comes any more
QUEUED = "queued"  # in a script: no replica has a place yet
WORKS = "works"  # in a script: a replica is busy with it, and lets that be heard
ENDS = "ends"  # in a script: the text is whole
WORDS: list[str | Exception | None] = ["My ", "dream ", "is tea."]
SILENCE_S = 0.2
PROMPT = PromptInfo("My", 1, "device", 0.0, 0.0, revision="abc")


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
        self.asked: list[GenerationRequest] = []
        self.num_cancelled = 0

    def options(self, **_: object) -> Replicas:
        return self

    def remote(self, request: GenerationRequest) -> Response:
        self.asked.append(request)
        return Response(self, self.scripts.pop(0))


class Response:
    """What Ray gives for such a call."""

    def __init__(self, replicas: Replicas, script: list[str | Exception | None]) -> None:
        self._replicas = replicas
        self._name = f"replica {len(replicas.asked)}"
        self._context = copy_context()  # of the call, in which Ray's router works
        self._items = with_pulse(self._play(script), SILENCE_S / 10) if WORKS in script else self._play(script)

    async def _play(self, script: list[str | Exception | None]) -> AsyncIterator[Any]:
        self._context.run(note_sent, self._name)
        for step in script:
            if step == QUEUED:
                self._context.run(note_queued)
                await asyncio.sleep(3 * SILENCE_S)
                self._context.run(note_sent, self._name)
            elif step == WORKS:
                await asyncio.sleep(3 * SILENCE_S)
            elif step is HANGS:
                await asyncio.Event().wait()
            elif step == ENDS:
                yield pack([Delta(0, "", finish_reason="length")])
            elif isinstance(step, RookeryError):
                yield step
            elif isinstance(step, Exception):
                raise step
            else:
                self._context.run(note_taken, self._name)
                yield pack([Delta(0, step, (TokenInfo(len(step), step, None),), prompt=PROMPT)]) if step else []

    def __aiter__(self) -> Response:
        return self

    async def __anext__(self) -> Any:
        return await anext(self._items)

    def cancel(self) -> None:
        self._replicas.num_cancelled += 1


def rpc_error(code: StatusCode) -> AioRpcError:
    return AioRpcError(code, Metadata(), Metadata(), "Stream removed")


def written(words: Sequence[Any]) -> tuple[Written, ...]:
    return (Written(tuple(map(len, words))),) if words else ()


async def text_by(replicas: Replicas, metrics: Metrics | None = None, *, is_whole: bool = False) -> str:
    generator = HandleGenerator(cast("DeploymentHandle[Any]", replicas), metrics, silence_s=SILENCE_S)
    request = GenerationRequest("ada", ("My dream is",), {}, is_whole=is_whole)
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
    replicas = Replicas([*before, error], WORDS[len(before) :])
    assert await text_by(replicas) == "My dream is tea."
    assert replicas.num_cancelled == 0
    assert [one.written for one in replicas.asked] == [(), written(before)]
    assert [one.model_id for one in replicas.asked] == ["ada", "ada@abc" if before else "ada"]


@pytest.mark.parametrize("error", LOST)
@pytest.mark.parametrize("before", [[], ["My "]])
async def test_a_text_that_costs_two_replicas_at_one_place_gets_no_third(before: list[str], error: Exception) -> None:
    replicas = Replicas([*before, error], [error], WORDS)
    with pytest.raises(StoreUnavailable):
        await text_by(replicas)
    assert len(replicas.scripts) == 1


async def test_a_text_that_grows_survives_several_deaths() -> None:
    replicas = Replicas([LOST[0]], ["My ", LOST[1]], ["dream ", LOST[2]], ["is tea."])
    assert await text_by(replicas) == "My dream is tea."
    assert [one.written for one in replicas.asked] == [(), (), written(WORDS[:1]), written(WORDS[:2])]


async def test_a_replica_that_is_lost_after_its_last_word_is_not_missed() -> None:
    replicas = Replicas(["My ", "dream ", "is tea.", ENDS, LOST[0]])
    assert await text_by(replicas) == "My dream is tea."


async def test_a_text_whose_revision_is_gone_is_to_be_asked_for_again() -> None:
    gone = ModelNotFound("gone")
    with pytest.raises(StoreUnavailable, match="has been replaced or deleted since; ask for it again") as raised:
        await text_by(Replicas(["My ", LOST[0]], [gone]))
    assert raised.value.retry_after_s


async def test_what_is_taken_up_elsewhere_is_counted_by_what_there_was_of_it() -> None:
    metrics = Metrics()
    await text_by(Replicas([LOST[0]], ["My ", LOST[0]], WORDS[1:]), metrics)
    await text_by(Replicas(["My ", LOST[0]], WORDS[1:]), metrics, is_whole=True)
    counted = {had: metrics.generations_resumed.labels(had)._value.get() for had in ("nothing", "stream", "whole")}
    assert counted == {"nothing": 1, "stream": 1, "whole": 1}


@pytest.mark.parametrize("before", [["My "], ["", ""], ["", "My ", "dream "]])
async def test_a_machine_that_falls_silent_is_as_good_as_dead(before: list[str]) -> None:
    replicas = Replicas([*before, HANGS], WORDS[len("".join(before).split()) :])
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

    async def wait(*_: object, **__: object) -> RunningReplica:
        await has_place.wait()
        return running("a")

    monkeypatch.setattr(RequestRouter, "_choose_replica_for_request", wait)  # what Ray calls: of 2.60
    router = object.__new__(ModelAffinityRouter)
    with follow() as assignment:
        choosing = asyncio.create_task(router._choose_replica_for_request(cast("PendingRequest", None)))
    await asyncio.sleep(0)
    assert assignment.when_sent() == math.inf
    has_place.set()
    await choosing
    assert assignment.replica == "a"
    assert assignment.when_sent() <= time.monotonic()


# --- A replica that hangs -------------------------------------------------------------------------------------


def running(name: str) -> RunningReplica:
    """As much of Ray's as the router looks at."""
    replica_id = ReplicaID(name, DeploymentID("Generator"))
    return cast("RunningReplica", SimpleNamespace(replica_id=replica_id, replica_metadata={}))


async def ranked(names: str) -> str:
    """The router's order of replicas for one model, their names of one letter each."""
    router = object.__new__(ModelAffinityRouter)
    router.initialize_state()
    router._replica_queue_len_cache = {}
    call: Any = SimpleNamespace(
        args=(GenerationRequest("ada", ("My",), {}),),
        metadata=SimpleNamespace(internal_request_id="id"),
        routing_context=SimpleNamespace(),
    )
    ranks = await router.choose_replicas([running(name) for name in names], call)
    return "".join(replica.replica_id.unique_id for (replica,) in ranks)


def give_up_a_call_to(replica: str) -> None:
    with follow() as assignment:
        note_sent(replica)
    assignment.give_up()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[float]]:
    now = [1000.0]
    monkeypatch.setattr("deployments.assignment.time", SimpleNamespace(monotonic=lambda: now[0]))
    yield now
    note_replicas([])


async def test_others_calls_go_elsewhere_while_one_at_a_time_finds_out_whether_it_is_well(clock: list[float]) -> None:
    well = await ranked("abc")
    first = well[0]
    last = well[1:] + first
    give_up_a_call_to(first)
    assert await ranked("abc") == last
    clock[0] += 25
    assert await ranked("abc") == well
    note_sent(first)  # one tries it, and is not heard yet
    assert await ranked("abc") == last
    note_taken(first)
    assert await ranked("abc") == well


async def test_of_replicas_that_all_hang_the_home_is_as_good_as_any(clock: list[float]) -> None:
    well = await ranked("ab")
    for replica in "ab":
        give_up_a_call_to(replica)
    assert await ranked("ab") == well


async def test_a_silence_makes_the_router_avoid_who_was_silent() -> None:
    replicas = Replicas(["My ", HANGS], WORDS[1:])
    assert await text_by(replicas) == "My dream is tea."
    assert is_silent("replica 1") and not is_silent("replica 2")
    note_replicas(["replica 2"])
    assert not is_silent("replica 1"), "the next one of that name, if any, is another"


@pytest.mark.parametrize("keys", ["", " , "])
def test_a_gateway_that_needs_keys_does_not_start_without(tmp_path: Path, keys: str) -> None:
    with pytest.raises(BadSetting, match="There is no key.*rookery keys create"):
        Gateway.__init__(
            object.__new__(Gateway),
            {"ROOKERY_API_KEYS": keys, "ROOKERY_DATA": str(tmp_path)},
            cast("Any", None),
            None,
            True,
        )


async def test_what_a_replica_refuses_is_asked_of_no_other() -> None:
    replicas = Replicas([ModelNotFound("gone")])
    with pytest.raises(ModelNotFound):
        await text_by(replicas)
    assert len(replicas.asked) == 1 and replicas.num_cancelled == 0


@pytest.mark.parametrize("code", [StatusCode.RESOURCE_EXHAUSTED, StatusCode.UNAUTHENTICATED, StatusCode.UNKNOWN])
def test_a_call_that_fails_everywhere_alike_is_no_loss(code: StatusCode) -> None:
    assert not is_gone(rpc_error(code))
