"""What the API counts: each kind of request, refusal and token, under labels that no caller can make more of."""

from __future__ import annotations

import asyncio
import re
from contextlib import suppress
from pathlib import Path

import httpx
import pytest

from serve.api.access import Access
from serve.api.app import build_api
from serve.api.service import Limits
from serve.errors import RookeryError
from serve.exposition import render
from serve.metrics import Metrics
from tests.api.conftest import Server, World, build_world
from tests.fakes.generator import EchoGenerator
from tests.fakes.keys import MemoryKeys
from tests.fakes.memory import MemoryCatalogue, MemoryFiles, MemoryJobs

ADA = "huggingtweets/ada"
TEMPLATE = re.compile(r"other|(/[a-zA-Z0-9_.:{}-]*)+")


def counted(metrics: Metrics, name: str) -> dict[tuple[str, ...], float]:
    """Label values -> value, of the series that are not 0."""
    samples = [sample for family in metrics.registry.collect() for sample in family.samples if sample.name == name]
    return {tuple(sample.labels.values()): sample.value for sample in samples if sample.value}


async def test_labels_are_bounded_whatever_is_asked_for(client: httpx.AsyncClient, world: World) -> None:
    for number in range(20):
        odd = f"odd{number}"
        await client.get(f"/v1/models/{odd}/{odd}")
        await client.get(f"/{odd}")
        await client.head(f"/{odd}/resolve/main/{odd}")
        await client.request(odd.upper(), f"/v1/{odd}")
        await client.post("/v1/completions", content=odd, headers={"content-type": f"application/{odd}"})
        await client.post("/v1/completions", json={"model": odd, "prompt": odd, odd: odd})
        await client.get(f"/v1/fine_tuning/jobs/{odd}?limit={odd}", headers={"x-request-id": odd, "accept": odd})
    samples = [sample for family in world.metrics.registry.collect() for sample in family.samples]
    assert not any("odd" in value for sample in samples for value in sample.labels.values())
    routes = counted(world.metrics, "rookery_requests_total")
    assert 3 < len(routes) < 12 and sum(routes.values()) == 140
    assert all(TEMPLATE.fullmatch(route) and re.fullmatch(r"[1-5]\d\d", status) for route, status in routes)
    assert counted(world.metrics, "rookery_requests_in_progress") == {}


async def test_time_between_tokens_is_observed_once_a_flush(client: httpx.AsyncClient, world: World) -> None:
    body = {"model": ADA, "prompt": "a b", "max_tokens": 5, "stream": True}
    assert (await client.post("/v1/completions", json=body)).status_code == 200
    assert counted(world.metrics, "rookery_time_to_first_token_seconds_count") == {("disk",): 1}
    (flushes,) = counted(world.metrics, "rookery_inter_token_seconds_count").values()
    assert 1 <= flushes <= 4
    assert counted(world.metrics, "rookery_tokens_generated_total") == {(): 5}


async def test_the_first_tokens_of_further_choices_are_no_gaps(client: httpx.AsyncClient, world: World) -> None:
    body = {"model": ADA, "prompt": "a b", "max_tokens": 1, "n": 3}
    assert (await client.post("/v1/completions", json=body)).status_code == 200
    assert counted(world.metrics, "rookery_time_to_first_token_seconds_count") == {("disk",): 1}
    assert counted(world.metrics, "rookery_inter_token_seconds_count") == {}


@pytest.mark.parametrize(
    ("model", "status", "outcome"),
    [
        (ADA, "200", "ok"),
        ("huggingtweets/missing", "404", "model_not_found"),
        ("huggingtweets/halfway", "500", "generation_failed"),
        ("huggingtweets/crash", "500", RookeryError.code),
    ],
)
async def test_a_stream_that_breaks_has_not_succeeded(
    client: httpx.AsyncClient, world: World, model: str, status: str, outcome: str
) -> None:
    body = {"model": model, "prompt": "a b", "max_tokens": 5, "stream": True}
    with suppress(RuntimeError):
        await client.post("/v1/completions", json=body)
    assert counted(world.metrics, "rookery_requests_total") == {("/v1/completions", status): 1}
    assert counted(world.metrics, "rookery_generations_total") == {(outcome,): 1}


async def test_a_failed_text_has_the_number_that_its_route_gives_it(client: httpx.AsyncClient, world: World) -> None:
    for route in ("/generate", "/generate_stream"):
        await client.post(route, json={"inputs": "a b", "model": "huggingtweets/halfway"})
        assert counted(world.metrics, "rookery_requests_total")[route, "424"] == 1
    assert counted(world.metrics, "rookery_generations_total") == {("generation_failed",): 2}


async def test_who_leaves_in_the_middle_of_a_stream_is_counted_as_that(server: Server, world: World) -> None:
    body = {"model": "huggingtweets/stuck", "prompt": "a b", "max_tokens": 5, "stream": True}
    async with (
        httpx.AsyncClient(base_url=server.url) as client,
        client.stream("POST", "/v1/completions", json=body) as reply,
    ):
        async for _ in reply.aiter_lines():
            break
    while not (outcomes := counted(world.metrics, "rookery_generations_total")):
        await asyncio.sleep(0.01)
    assert outcomes == {("left",): 1}


async def test_refused_bodies_are_counted_by_why(tmp_path: Path) -> None:
    world = build_world(tmp_path, Limits(json_bytes=100))
    transport = httpx.ASGITransport(app=world.app)
    json = {"content-type": "application/json"}
    async with httpx.AsyncClient(transport=transport, base_url="http://rookery") as client:
        await client.post("/v1/completions", content=b"{" + b" " * 200 + b"}", headers=json)
        await client.post("/v1/completions", content=b"{}", headers={"content-type": "text/plain"})
        await client.post("/v1/completions", content=b"{", headers=json)
        form = {"content-type": "multipart/form-data; boundary=x"}
        await client.post("/v1/files", content=b"--x\r\n", headers=form)
    assert counted(world.metrics, "rookery_body_rejections_total") == {
        ("too_large",): 1,
        ("media_type",): 1,
        ("invalid",): 1,
        ("bad_form",): 1,
    }


@pytest.mark.parametrize(
    ("headers", "reason"),
    [
        ({}, "missing"),
        ({"authorization": "Bearer no"}, "wrong"),
        ({"authorization": "Bearer sk-one", "sec-fetch-site": "cross-site"}, "cross_site"),
        ({"authorization": "Bearer sk-one", "host": "elsewhere.test"}, "unknown_host"),
        ({"authorization": "Bearer sk-one"}, None),
    ],
)
async def test_who_is_refused_is_counted_by_why(tmp_path: Path, headers: dict[str, str], reason: str | None) -> None:
    files, metrics = MemoryFiles(tmp_path / "files"), Metrics()
    app = build_api(
        generator=EchoGenerator(),
        catalogue=MemoryCatalogue(ADA),
        files=files,
        jobs=MemoryJobs(files),
        upload_dir=tmp_path / "uploads",
        metrics=metrics,
        access=Access(MemoryKeys("sk-one"), ["rookery"], metrics),
    )
    transport = httpx.ASGITransport(app=app)
    async with httpx.AsyncClient(transport=transport, base_url="http://rookery") as client:
        await client.delete(f"/v1/models/{ADA}", headers=headers)
    assert counted(metrics, "rookery_auth_failures_total") == ({(reason,): 1} if reason else {})


async def test_a_request_that_is_answered_is_in_progress_meanwhile(client: httpx.AsyncClient, world: World) -> None:
    text = (await client.get("/metrics")).text  # its own
    assert "rookery_requests_in_progress 1.0" in text
    assert b"rookery_requests_in_progress 0.0" in render(world.metrics)[0]


@pytest.mark.parametrize("accept", ["", "application/openmetrics-text; version=1.0.0"])
async def test_the_form_is_the_callers_choice(client: httpx.AsyncClient, accept: str) -> None:
    answer = await client.get("/metrics", headers={"accept": accept})
    assert answer.headers["content-type"].startswith("application/openmetrics-text" if accept else "text/plain")
    assert answer.text.endswith("# EOF\n") is bool(accept)
