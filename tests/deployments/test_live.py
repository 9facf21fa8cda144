"""The live application as its callers see it."""

from __future__ import annotations

import asyncio
import os
import signal
import socket

import httpx
import openai
import psutil  # type: ignore[import-untyped]
import pytest

from deployments.haproxy import find_haproxy
from tests.deployments.conftest import BASE, LiveService, import_tiny_model

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]


@pytest.fixture
def client(live_url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{live_url}/v1", api_key="none", max_retries=0, timeout=60)


def test_it_is_ready(live_url: str) -> None:
    assert httpx.get(f"{live_url}/readyz", timeout=30).json() == {"status": "ready"}


def test_a_completion_is_the_same_for_the_same_seed(client: openai.OpenAI) -> None:
    texts = {
        client.completions.create(model=BASE, prompt="I think", max_tokens=20, seed=7).choices[0].text for _ in range(4)
    }
    assert len(texts) == 1


def test_a_stream_adds_up_to_the_whole_text(client: openai.OpenAI) -> None:
    whole = client.completions.create(model=BASE, prompt="I think", max_tokens=30, seed=7)
    pieces = client.completions.create(model=BASE, prompt="I think", max_tokens=30, seed=7, stream=True)
    assert "".join(choice.text for piece in pieces for choice in piece.choices) == whole.choices[0].text


def test_an_unknown_model_is_a_404_that_says_so(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        client.completions.create(model="no/such", prompt="I think")
    assert caught.value.code == "model_not_found"


def test_a_wrong_parameter_found_by_a_replica_keeps_its_name(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model=BASE, prompt="I think", max_tokens=500)
    assert caught.value.code == "context_length_exceeded"


def test_a_body_announced_as_too_large_is_refused_before_it_is_waited_for(live_url: str) -> None:
    address = httpx.URL(live_url)
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {address.host}\r\nContent-Type: application/json\r\n"
    with socket.create_connection((address.host, address.port), timeout=20) as caller:
        caller.sendall(f"{head}Content-Length: {2 << 20}\r\n\r\n".encode())
        assert caller.recv(1 << 12).startswith(b"HTTP/1.1 413 ")


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/fine_tuning/jobs"])
async def test_who_sends_a_body_that_is_too_large_learns_of_it(live_url: str, path: str) -> None:
    """Where the connection is closed in the middle of it, an asyncio client gives up, unread answer or not."""
    headers = {"content-type": "application/json"}
    async with httpx.AsyncClient(base_url=live_url, timeout=60) as client:
        sent = [client.post(path, content=b" " * (8 << 20), headers=headers) for _ in range(8)]
        replies = await asyncio.gather(*sent)
    assert [(reply.status_code, reply.json()["error"]["code"]) for reply in replies] == [(413, "payload_too_large")] * 8


def test_a_model_published_while_it_runs_is_served_at_once(live_service: LiveService, client: openai.OpenAI) -> None:
    import_tiny_model(live_service.data, "tiny/newcomer", seed=1)
    assert client.completions.create(model="tiny/newcomer", prompt="I think", max_tokens=5).usage is not None
    assert "tiny/newcomer" in {model.id for model in client.models.list()}


def test_metrics_are_those_of_all_processes(live_service: LiveService) -> None:
    text = httpx.get(f"{live_service.url}/metrics", timeout=30).text
    assert 'rookery_pool_budget_bytes{tier="device"} 1e+08' in text  # of two generators with 50 MB each
    assert 'rookery_jobs{state="queued"}' in text  # which a trainer counts


def test_haproxy_is_in_front_and_open_to_this_machine_alone(live_service: LiveService) -> None:
    if find_haproxy() is None:
        pytest.skip("there is no HAProxy here")
    family = psutil.Process(live_service.process.pid).children(recursive=True)
    proxies = [child for child in family if child.name() == "haproxy"]
    assert proxies
    tcp = [found for proxy in proxies for found in proxy.net_connections("tcp") if found.status == psutil.CONN_LISTEN]
    assert {(found.laddr.ip, found.laddr.port) for found in tcp} == {("127.0.0.1", httpx.URL(live_service.url).port)}


async def test_a_client_that_leaves_frees_its_place(live_url: str) -> None:
    body = {"model": BASE, "prompt": "I", "max_tokens": 60, "ignore_eos": True, "n": 16, "stream": True}
    async with httpx.AsyncClient(base_url=live_url, timeout=60) as client:
        for _ in range(8):  # 128 sequences of which at most 64 run at once: what is not freed blocks the last one
            async with client.stream("POST", "/v1/completions", json=body) as response:
                assert response.status_code == 200
                await anext(response.aiter_lines())
        async with asyncio.timeout(20):
            reply = await client.post("/v1/completions", json={"model": BASE, "prompt": "I", "max_tokens": 2})
        assert reply.status_code == 200


async def test_requests_survive_the_death_of_a_replica(live_service: LiveService) -> None:
    body = {"model": BASE, "prompt": "I think", "max_tokens": 40, "seed": 3, "ignore_eos": True}
    async with httpx.AsyncClient(base_url=live_service.url, timeout=60) as client:
        expected = (await client.post("/v1/completions", json=body)).json()["choices"]

        async def ask() -> None:
            reply = await client.post("/v1/completions", json=body)
            assert (reply.status_code, reply.json().get("choices")) == (200, expected), reply.text

        async with asyncio.TaskGroup() as group:
            for number in range(60):
                group.create_task(ask())
                await asyncio.sleep(0.02)  # a steady stream of requests, so that some are under way at any time
                if number == 15:
                    os.kill(live_service.replica_pids("generator")[0], signal.SIGKILL)


async def test_a_stream_whose_replica_dies_goes_on_or_says_that_it_cannot(live_service: LiveService) -> None:
    body = {"model": BASE, "prompt": "I", "max_tokens": 60, "ignore_eos": True, "stream": True, "n": 4, "seed": 5}
    async with httpx.AsyncClient(base_url=live_service.url, timeout=60) as client:

        async def last_event() -> str:
            async with client.stream("POST", "/v1/completions", json=body) as response:
                lines = [line async for line in response.aiter_lines() if line]
            return lines[-1]

        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(last_event()) for _ in range(24)]
            await asyncio.sleep(0.4)
            for pid in live_service.replica_pids("generator"):
                os.kill(pid, signal.SIGKILL)
        assert {"data: [DONE]" if t.result() == "data: [DONE]" else t.result()[:14] for t in tasks} <= {
            "data: [DONE]",
            'data: {"error"',
        }
