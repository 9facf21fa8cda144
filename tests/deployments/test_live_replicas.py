"""Two live replicas are one cache of models: each has its home, a hot one spills, a death moves only its own."""

from __future__ import annotations

import asyncio
import os
import signal
from collections import Counter
from collections.abc import Iterable

import httpx
import pytest

from deployments.router import BOUND, rank
from serve.store.revisions import Store
from tests.deployments.conftest import LiveService, wait_until
from tests.fakes.models import write_tiny_gpt2

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]

SEATS = ["seat 0", "seat 1"]
NUM_AT_HOME = 9  # of 4 MB each; a replica of the live service has room for 12 of them
BACK_S = 60.0


def home_of(model_id: str) -> str:
    return rank(model_id, SEATS, {}, bound=BOUND)[0][0]


def pick_models() -> dict[str, list[str]]:
    """As many ids for each seat; the hash is fixed, so these are the same ones in every run."""
    models: dict[str, list[str]] = {seat: [] for seat in SEATS}
    for number in range(1000):
        at_home = models[home_of(f"flock/m{number}")]
        if len(at_home) < NUM_AT_HOME:
            at_home.append(f"flock/m{number}")
    return models


MODELS = pick_models()
ALL = [model for both in zip(*MODELS.values(), strict=True) for model in both]


@pytest.fixture(scope="module", autouse=True)
def flock(live_service: LiveService) -> None:
    folder = write_tiny_gpt2(live_service.data / "flock", n_embd=192)
    for model in ALL:
        Store(live_service.data, embedded={}).import_folder(folder, model)


@pytest.fixture(autouse=True)
def both_are_there(live_service: LiveService) -> None:
    wait_until(lambda: num_replicas(live_service.url) == 2, BACK_S)


def num_replicas(url: str) -> int:
    return len(httpx.get(f"{url}/v1/replicas", timeout=30).json().get("data", ()))


def tiers(url: str, models: Iterable[str]) -> dict[str, str]:
    """Asks each model for a token, one after another; where its weights were."""
    found = {}
    for model in models:
        reply = httpx.post(f"{url}/v1/completions", json={"model": model, "prompt": "I", "max_tokens": 1}, timeout=60)
        assert reply.status_code == 200, reply.text
        found[model] = reply.headers["x-model-tier"]
    return found


def replicas_of(url: str) -> dict[str, set[str]]:
    """Model -> the replicas that have it in memory."""
    found: dict[str, set[str]] = {}
    for one in httpx.get(f"{url}/v1/residents", timeout=30).json()["data"]:
        found.setdefault(one["model"], set()).add(one["replica"])
    return found


def test_two_replicas_hold_twice_as_many_models_as_one_each_at_its_home(live_url: str) -> None:
    tiers(live_url, ALL)
    assert set(tiers(live_url, ALL).values()) == {"device"}  # all 18 fit, where one replica has room for 12
    replicas = replicas_of(live_url)
    assert {len(replicas[model]) for model in ALL} == {1}
    homes = Counter((home_of(model), next(iter(replicas[model]))) for model in ALL)
    assert list(homes.values()) == [NUM_AT_HOME, NUM_AT_HOME], homes


def test_the_service_tells_of_every_replica_what_it_holds(live_url: str) -> None:
    tiers(live_url, ALL)
    told = httpx.get(f"{live_url}/v1/replicas", timeout=30).json()["data"]
    assert len({one["replica"] for one in told}) == 2
    for one in told:
        residents = one["residents"]
        assert {resident["replica"] for resident in residents} == {one["replica"]}
        assert one["used_bytes"] == sum(resident["bytes"] for resident in residents) <= one["budget_bytes"]
        assert (one["waiting"], one["queued"], one["running"]) == (0, 0, 0) and one["up_s"] > 0
    status = httpx.get(f"{live_url}/v1/status", timeout=30).json()
    assert status["ready"] and status["replicas"] == 2
    assert {resident["model"] for one in told for resident in one["residents"]} >= set(ALL)
    assert status["used_bytes"] <= status["budget_bytes"] == sum(one["budget_bytes"] for one in told)


async def test_a_hot_model_spills_to_the_other_replica_and_the_rest_stay(live_url: str) -> None:
    # 16 texts a request: the home is still at the first when the next ones come, and has no more waiting than running.
    hot, body = ALL[0], {"prompt": "I", "max_tokens": 60, "ignore_eos": True, "n": 16}
    await asyncio.to_thread(tiers, live_url, ALL)
    async with httpx.AsyncClient(base_url=live_url, timeout=60) as client:
        asked = [client.post("/v1/completions", json=body | {"model": hot}) for _ in range(8)]
        replies = await asyncio.gather(*asked)
    assert {reply.status_code for reply in replies} == {200}
    replicas = await asyncio.to_thread(replicas_of, live_url)
    assert len(replicas[hot]) == 2
    assert {len(replicas[model]) for model in ALL if model != hot} == {1}


@pytest.mark.slow
def test_a_replica_that_is_killed_and_replaced_moves_only_its_own_share(live_service: LiveService) -> None:
    url = live_service.url
    tiers(url, ALL)
    before = replicas_of(url)
    os.kill(live_service.replica_pids("generator")[0], signal.SIGKILL)
    wait_until(lambda: num_replicas(url) == 1, BACK_S)
    assert len(httpx.get(f"{url}/v1/replicas", timeout=30).json()["data"]) == 1
    left = replicas_of(url)
    (survivor,) = {replica for names in left.values() for replica in names}
    (seat,) = {home_of(model) for model in ALL if before[model] == {survivor}}
    others = [model for model in ALL if home_of(model) != seat]
    assert set(tiers(url, MODELS[seat]).values()) == {"device"}
    wait_until(lambda: num_replicas(url) == 2, BACK_S)
    assert set(tiers(url, MODELS[seat]).values()) == {"device"}, "the newcomer took what was not its own"
    assert "device" not in tiers(url, others).values()
    assert set(tiers(url, ALL).values()) == {"device"}
    after = replicas_of(url)
    assert all(after[model] == {survivor} for model in MODELS[seat])
    (newcomer,) = {replica for names in after.values() for replica in names} - {survivor}
    assert all(newcomer in after[model] for model in others)
