"""What an operator can ask of the whole service."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import httpx
import pytest

from serve.api import overview
from serve.api.access import Access
from serve.api.app import build_api
from serve.errors import StoreUnavailable
from serve.types import Eviction, JobStatus, ReplicaView, Resident
from serve.version import VERSION
from tests.api.conftest import World
from tests.fakes.generator import replica_view
from tests.fakes.keys import MemoryKeys

ADA = Resident("huggingtweets/ada", "abc123", "disk", 500, 2, 0.0, "r1")
BOB = Resident("huggingtweets/bob", "def456", "hub", 300, 0, 1.25, "r1")
ADA_AGAIN = Resident("huggingtweets/ada", "abc123", "disk", 500, 0, 7.0, "r2")
GONE = Eviction("huggingtweets/eve", "fff999", "budget", 400, 12.3456)


async def get(client: httpx.AsyncClient, path: str, **headers: str) -> Any:
    answer = await client.get(path, headers=headers)
    answer.raise_for_status()
    return answer.json()


@pytest.fixture
def replicas(world: World) -> list[ReplicaView]:
    world.generator.views = [replica_view("r1", ADA, BOB, evictions=[GONE]), replica_view("r2", ADA_AGAIN)]
    return world.generator.views


@pytest.mark.usefixtures("replicas")
async def test_replicas_are_told_with_residents_and_evictions(client: httpx.AsyncClient) -> None:
    told = await get(client, "/v1/replicas")
    assert told["object"] == "list" and [one["replica"] for one in told["data"]] == ["r1", "r2"]
    first = told["data"][0]
    numbers = {"used_bytes": 800, "budget_bytes": 1 << 30, "waiting": 0, "queued": 0, "running": 0, "up_s": 60.0}
    assert first == {
        "replica": "r1",
        "device": "cpu",
        "dtype": "float32",
        **numbers,
        "residents": [one for one in (await get(client, "/v1/residents"))["data"] if one["replica"] == "r1"],
        "evictions": [
            {"model": GONE.model_id, "revision": "fff999", "reason": "budget", "bytes": 400, "ago_s": 12.346}
        ],
    }


@pytest.mark.usefixtures("replicas")
async def test_residents_are_those_of_all_replicas(client: httpx.AsyncClient) -> None:
    told = await get(client, "/v1/residents")
    assert [(one["model"], one["replica"]) for one in told["data"]] == [
        (ADA.model_id, "r1"),
        (BOB.model_id, "r1"),
        (ADA.model_id, "r2"),
    ]
    assert told["data"][1] == {
        "model": BOB.model_id,
        "revision": "def456",
        "tier": "hub",
        "bytes": 300,
        "leases": 0,
        "idle_s": 1.25,
        "replica": "r1",
    }


async def test_the_top_tells_models_and_callers_in_both_orders(client: httpx.AsyncClient, world: World) -> None:
    for model, caller, num_tokens in (("ada", "k1", 5), ("ada", "k1", 5), ("bob", "", 100)):
        world.generator.usage.add(model, caller, num_tokens)
    told = await get(client, "/v1/top?limit=1")
    exact = {"requests_error": 0, "tokens_error": 0}
    assert (told["object"], told["requests"], told["tokens"]) == ("top", 3, 110)
    assert told["models"] == {
        "by_requests": [{"model": "ada", "requests": 2, "tokens": 10, **exact}],
        "by_tokens": [{"model": "bob", "requests": 1, "tokens": 100, **exact}],
    }
    assert told["callers"]["by_requests"] == [{"caller": "k1", "requests": 2, "tokens": 10, **exact}]
    for limit in ("0", "101", "x"):
        answer = await client.get("/v1/top", params={"limit": limit})
        assert answer.status_code == 400 and answer.json()["error"]["param"] == "limit"


@pytest.mark.usefixtures("replicas")
async def test_the_status_adds_up_what_the_parts_say(client: httpx.AsyncClient, world: World) -> None:
    world.jobs.count_jobs = lambda: {JobStatus.RUNNING: 2}  # type: ignore[method-assign]
    assert await get(client, "/v1/status") == {
        "version": VERSION,
        "base_model": "fledgling",
        "ready": True,
        "replicas": 2,
        "resident_models": 2,
        "used_bytes": 1300,
        "budget_bytes": 2 << 30,
        "queued": 0,
        "running": 0,
        "jobs": {status: 2 if status is JobStatus.RUNNING else 0 for status in JobStatus},
        "models": 3,
        "hub": {"enabled": False},
    }


async def test_a_part_that_is_away_leaves_a_gap_and_no_error(client: httpx.AsyncClient, world: World) -> None:
    def away() -> Any:
        raise StoreUnavailable("The database is away.")

    async def gone() -> Any:
        raise StoreUnavailable("No generator answers now.")

    world.generator.is_ready = False
    world.generator.replicas = gone  # type: ignore[method-assign]
    world.jobs.count_jobs = away  # type: ignore[method-assign]
    told = await get(client, "/v1/status")
    assert (told["ready"], told["replicas"], told["jobs"], told["models"]) == (False, None, None, 3)
    assert (told["used_bytes"], told["running"]) == (0, 0)


async def test_a_status_does_not_wait_long_for_a_generator(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    async def wait() -> Any:
        await asyncio.Event().wait()

    world.generator.check_ready = world.generator.replicas = wait  # type: ignore[method-assign]
    monkeypatch.setattr(overview, "_READY_S", 0.01)
    monkeypatch.setattr(overview, "_ANSWER_S", 0.01)
    app = build_over(world)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://rookery") as client:
        told = await asyncio.wait_for(get(client, "/v1/status"), 5)
    assert (told["ready"], told["replicas"]) == (False, None)


async def test_without_a_key_the_status_is_whether_it_is_ready(world: World) -> None:
    app = build_over(world, "sk-key")
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://rookery") as client:
        assert await get(client, "/v1/status") == {"version": VERSION, "ready": True}
        assert "jobs" in await get(client, "/v1/status", authorization="Bearer sk-key")


def build_over(world: World, *keys: str) -> Any:
    folder: Path = world.upload_dir
    return build_api(
        generator=world.generator,
        catalogue=world.catalogue,
        files=world.files,
        jobs=world.jobs,
        upload_dir=folder,
        access=Access(MemoryKeys(*keys)),
    )
