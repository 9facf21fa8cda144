"""What every route does: errors of our shapes, ids, limits, leaving clients, health and metrics."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from serve.api.app import build_api
from serve.api.service import Limits
from tests.api.conftest import Server, World, build_world

ADA = "huggingtweets/ada"
JSON_ROUTES = [
    *("/v1/completions", "/v1/fine_tuning/jobs", f"/v1/models/{ADA}/rollback"),
    *("/generate", "/generate_stream", "/", f"/models/{ADA}"),
]
FORM_ROUTES = ["/v1/files", "/v1/bots", "/v1/archives/preview"]
JSON = {"content-type": "application/json"}


# --- Bad bodies -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"null",
        b"[]",
        b'"text"',
        b'{"model": NaN}',
        b'{"model": "a", "inputs": "a", "temperature": 1e999, "parameters": {"temperature": 1e999}, "seed": 1e999}',
        b'{"model": "a", "prompt": "\\ud800", "inputs": "\\ud800", "training_file": "\\ud800"}',
        b'{"model": "\xff"}',
        "\ufeff{}".encode("utf-16"),
        b"[" * 100_000,
        b'{"a":' * 10_000,
        b'{"model": "m", "seed": ' + b"9" * 10_000 + b', "inputs": 1}',
    ],
)
async def test_b2_a_body_that_is_not_good_json_is_a_short_4xx(client: httpx.AsyncClient, body: bytes) -> None:
    for route in JSON_ROUTES:
        answer = await client.post(route, content=body, headers=JSON)
        assert answer.status_code in (400, 422), (route, answer.text)
        assert len(answer.content) < 4096 and "error" in answer.json(), route


@pytest.mark.parametrize("route", JSON_ROUTES)
async def test_b3_a_body_over_a_megabyte_is_413(client: httpx.AsyncClient, route: str) -> None:
    async def unannounced() -> AsyncIterator[bytes]:
        for _ in range(20):
            yield b" " * 65536

    assert (await client.post(route, content=b" " * 1_100_000, headers=JSON)).status_code == 413
    assert (await client.post(route, content=unannounced(), headers=JSON)).status_code == 413


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"content-type": "text/plain"},
        {"content-type": "application/x-www-form-urlencoded"},
        {"content-type": "application/json; charset=utf-16"},
        {"content-type": "application/json", "content-encoding": "gzip"},
    ],
)
async def test_b4_another_content_type_is_415(client: httpx.AsyncClient, headers: dict[str, str]) -> None:
    for route in JSON_ROUTES:
        assert (await client.post(route, content=b"{}", headers=headers)).status_code == 415, route


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_tokens", 0),
        ("max_tokens", 10**9),
        ("max_tokens", "16"),
        ("max_tokens", 1.5),
        ("n", True),
        ("n", 17),
        ("n", -1),
        ("best_of", 17),
        ("temperature", -0.1),
        ("temperature", 2.1),
        ("temperature", "hot"),
        ("top_p", 0),
        ("top_p", 1.1),
        ("top_k", -1),
        ("typical_p", 0),
        ("repetition_penalty", 0),
        ("frequency_penalty", 3),
        ("logprobs", 6),
        ("seed", 2**64),
        ("stop", ["a"] * 5),
        ("stop", [""]),
        ("stop", "x" * 65),
        ("logit_bias", {"secret": 1}),
        ("logit_bias", {"1": 101}),
        ("logit_bias", {str(i): 1 for i in range(301)}),
        ("prompt", []),
        ("prompt", [[]]),
        ("prompt", [1, "a"]),
        ("prompt", [-1]),
        ("prompt", [10**9]),
        ("prompt", {"a": 1}),
        ("prompt", ["a"] * 65),
        ("prompt", "x" * 300_000),
        ("min_tokens", 17),
        ("stream_options", {"include_usage": True}),
        ("suffix", ""),
        ("echo", 1),
    ],
)
async def test_b5_b6_a_parameter_out_of_range_is_a_400_that_names_it(
    client: httpx.AsyncClient, field: str, value: Any
) -> None:
    answer = await client.post("/v1/completions", json={"model": ADA, "prompt": "a", field: value})
    assert answer.status_code == 400 and len(answer.content) < 4096
    error = answer.json()["error"]
    assert error["type"] == "invalid_request_error" and error["param"] == field
    assert "secret" not in answer.text


@pytest.mark.parametrize(
    "asked",
    [{"prompt": ["a"] * 64, "n": 4}, {"n": 16, "best_of": 8}, {"best_of": 2, "stream": True}],
)
async def test_b5_too_many_sequences_are_refused(client: httpx.AsyncClient, asked: dict[str, Any]) -> None:
    assert (await client.post("/v1/completions", json={"model": ADA, "prompt": "a", **asked})).status_code == 400


@pytest.mark.parametrize(
    ("asked", "code"),
    [
        ({"prompt": "x" * 300_000}, "context_length_exceeded"),
        ({"prompt": [1] * 300_000}, "context_length_exceeded"),
        ({"prompt": "x" * 300_000, "truncate": 10}, "invalid_value"),
        ({"prompt": ["x" * 200_000] * 2}, "invalid_value"),
    ],
)
async def test_b5_a_prompt_that_fits_no_context_is_told_from_too_many(
    client: httpx.AsyncClient, asked: dict[str, Any], code: str
) -> None:
    answer = await client.post("/v1/completions", json={"model": ADA, **asked})
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["param"]) == (400, code, "prompt")


async def test_b5_too_many_tokens_in_all_are_refused(client: httpx.AsyncClient) -> None:
    asked = {"model": ADA, "prompt": ["a"] * 64, "n": 2, "max_tokens": 1024}
    assert (await client.post("/v1/completions", json=asked)).status_code == 400


@pytest.mark.parametrize(
    "model",
    [
        "",
        "../a",
        "a/../b",
        "a/b/c",
        "a\\b",
        "a\x00",
        "a\u202eb",
        "ａda",
        "con..fig",
        "x.git",
        "a--b",
        "x" * 300,
        "@main",
    ],
)
async def test_b1_an_impossible_model_id_is_refused_before_anything_is_asked(
    client: httpx.AsyncClient, world: World, model: str
) -> None:
    answer = await client.post("/v1/completions", json={"model": model, "prompt": "a"})
    assert answer.status_code in (400, 404) and not world.generator.requests
    answer = await client.post("/generate", json={"inputs": "a", "parameters": {"adapter_id": model or ".."}})
    assert answer.status_code in (404, 422) and not world.generator.requests


@pytest.mark.parametrize("path", ["%2e%2e%2fetc", "a%5cb", "a%00", "%ff", "a%2fb%2fc", "..%2f..%2fetc%2fpasswd"])
async def test_b1_an_impossible_model_id_in_a_path_is_404(client: httpx.AsyncClient, world: World, path: str) -> None:
    assert (await client.get(f"/v1/models/{path}")).status_code == 404
    assert (await client.delete(f"/v1/models/{path}")).status_code == 404
    assert (await client.post(f"/models/{path}", json={"inputs": "a"})).status_code == 404
    assert not world.generator.requests


async def test_at_most_five_errors_are_told(client: httpx.AsyncClient) -> None:
    body = {"model": 1, "n": "a", "best_of": "a", "seed": "a", "echo": "a", "stream": "a", "top_p": "a"}
    answer = await client.post("/v1/completions", json=body)
    assert answer.json()["error"]["message"].count(";") == 4


_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=12), inner, max_size=4),
    max_leaves=12,
)
_FIELDS = """
    model prompt n best_of echo logprobs stop stream stream_options seed logit_bias temperature top_p top_k max_tokens
    suffix inputs parameters training_file training_files hyperparameters method metadata handle
    validation_file integrations priority revision
"""
_fields = st.sampled_from(_FIELDS.split())
_MARK = "zq-echo-mark-zq"


@pytest.fixture(scope="module")
def module_world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return build_world(tmp_path_factory.mktemp("fuzz"), Limits())


@settings(max_examples=200, suppress_health_check=[HealthCheck.too_slow])
@given(route=st.sampled_from(JSON_ROUTES), body=st.dictionaries(_fields, _values, max_size=6))
def test_b2_random_bodies_never_give_a_5xx_and_are_never_repeated(
    module_world: World, route: str, body: dict[str, Any]
) -> None:
    body = {"model": ADA, "inputs": "a", **body, _MARK: _MARK, "user": _MARK}
    raw = json.dumps(body).encode()

    async def post() -> httpx.Response:
        transport = httpx.ASGITransport(app=module_world.app)
        async with httpx.AsyncClient(transport=transport, base_url="http://rookery") as client:
            return await client.post(route, content=raw, headers=JSON)

    answer = asyncio.run(post())
    assert answer.status_code < 500, answer.text
    assert _MARK not in answer.text
    if answer.status_code >= 400:
        assert len(answer.content) < 4096 and "error" in answer.json()


@settings(max_examples=200)
@given(body=st.binary(max_size=300), route=st.sampled_from([*JSON_ROUTES, *FORM_ROUTES]))
def test_b4_random_bytes_never_give_a_5xx(module_world: World, route: str, body: bytes) -> None:
    kind = "multipart/form-data; boundary=b" if route in FORM_ROUTES else "application/json"
    raw = b"--b\r\n" + body if kind.startswith("multipart") else body

    async def post() -> httpx.Response:
        transport = httpx.ASGITransport(app=module_world.app)
        async with httpx.AsyncClient(transport=transport, base_url="http://rookery") as client:
            return await client.post(route, content=raw, headers={"content-type": kind})

    assert 400 <= asyncio.run(post()).status_code < 500


# --- Routes and ids ---------------------------------------------------------------------------------------


async def test_unknown_routes_and_methods_answer_in_json(client: httpx.AsyncClient) -> None:
    for path, method, code in [("/v1/nothing", "GET", 404), ("/nothing", "GET", 404), ("/v1/completions", "GET", 405)]:
        answer = await client.request(method, path)
        assert answer.status_code == code and "error" in answer.json()
    assert (await client.get("/v1/completions")).headers["allow"] == "POST"
    assert (await client.get("/v1/nothing")).json()["error"]["code"] == "unknown_url"


async def test_a_wrong_query_names_the_parameter(client: httpx.AsyncClient) -> None:
    answer = await client.get("/v1/models", params={"limit": "secret"})
    assert answer.status_code == 400 and answer.json()["error"]["param"] == "limit" and "secret" not in answer.text


async def test_every_answer_has_a_request_id(client: httpx.AsyncClient, world: World) -> None:
    given_id = {"x-request-id": "my-id.1"}
    assert (await client.get("/nothing", headers=given_id)).headers["x-request-id"] == "my-id.1"
    answer = await client.post("/generate", json={"inputs": "a"}, headers=given_id)
    assert answer.headers["x-request-id"] == world.generator.requests[0].request_id == "my-id.1"
    for bad in ("a b", "x" * 200, ""):
        assert (await client.get("/healthz", headers={"x-request-id": bad})).headers["x-request-id"].startswith("req-")


async def test_a_bug_is_a_500_with_an_id_and_no_detail(client: httpx.AsyncClient, world: World) -> None:
    def broken(model_id: str) -> None:
        raise RuntimeError("secret detail")

    world.catalogue.get_model = broken  # type: ignore[method-assign, assignment]
    answer = await client.get(f"/v1/models/{ADA}")
    assert answer.status_code == 500 and answer.headers["x-request-id"] in answer.text and "secret" not in answer.text
    assert answer.json()["error"]["type"] == "server_error"


# --- Clients that leave, and time that runs out -----------------------------------------------------------


@pytest.mark.parametrize("stream", [True, False])
def test_f21_closing_the_connection_closes_the_generation(server: Server, world: World, stream: bool) -> None:
    body = json.dumps({"model": "stuck", "prompt": "a", "stream": stream}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(body)}"
    with socket.create_connection(server.socket.getsockname(), timeout=10) as connection:
        connection.sendall(head.encode() + b"\r\n\r\n" + body)
        if stream:
            assert b"200 OK" in connection.recv(65536)
        else:
            connection.settimeout(0.3)
            with pytest.raises(TimeoutError):
                connection.recv(1)
        assert world.generator.num_closed == 0

    async def closed() -> None:
        while not world.generator.num_closed:
            await asyncio.sleep(0.01)

    asyncio.run(asyncio.wait_for(closed(), 5))


@pytest.mark.parametrize("stream", [True, False])
async def test_a_generation_that_takes_too_long_ends_with_an_error(tmp_path: Path, stream: bool) -> None:
    world = build_world(tmp_path, Limits(generate_s=0.1))
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app=world.app), base_url="http://rookery") as client:
        answer = await client.post("/v1/completions", json={"model": "stuck", "prompt": "a", "stream": stream})
    assert answer.status_code == (200 if stream else 504)
    assert "deadline_exceeded" in answer.text and "[DONE]" not in answer.text
    assert world.generator.num_closed == 1


async def test_a_call_that_is_cancelled_beneath_a_request_is_an_answer_of_ours(
    client: httpx.AsyncClient, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def view() -> None:
        """As a replica's answer ends that is cancelled with its replica."""
        lost = asyncio.get_running_loop().create_future()
        lost.cancel()
        await lost

    monkeypatch.setattr(world.generator, "replicas", view)
    answer = await client.get("/v1/replicas")
    assert answer.status_code == 500 and answer.headers["x-frame-options"] == "DENY"
    assert answer.headers["x-request-id"] in answer.json()["error"]["message"]


async def test_every_generation_is_closed_once(client: httpx.AsyncClient, world: World) -> None:
    for model in (ADA, "missing", "halfway", "crash", "nan"):
        for stream in (True, False):
            await client.post("/v1/completions", json={"model": model, "prompt": "a", "stream": stream})
            await client.post(f"/models/{model}", json={"inputs": "a", "stream": stream})
    assert world.generator.num_closed == len(world.generator.requests) == 20


def test_b3_a_body_that_stops_coming_is_408(server: Server) -> None:
    head = b"POST /generate HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: 50\r\n\r\n{"
    with socket.create_connection(server.socket.getsockname(), timeout=10) as connection:
        connection.sendall(head)
        assert b" 408 " in connection.recv(65536)


@pytest.mark.parametrize(
    "raw",
    [
        b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 5\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
        b"POST / HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n",
        b"GET /\r\n\r\n",
        b"\x00\x01\x02\r\n\r\n",
        b"GET / HTTP/1.1\r\n" + b"a: b\r\n" * 20_000 + b"\r\n",
        b"GET /" + b"x" * 200_000 + b" HTTP/1.1\r\nhost: x\r\n\r\n",
        b"GET /v1/files/x/content HTTP/1.1\r\nhost: x\r\nrange: bytes=" + b"0-0," * 2000 + b"\r\n\r\n",
    ],
)
def test_b14_broken_http_never_hangs_or_gives_a_5xx(server: Server, raw: bytes) -> None:
    with socket.create_connection(server.socket.getsockname(), timeout=10) as connection:
        try:
            connection.sendall(raw)
            connection.shutdown(socket.SHUT_WR)
            answer = connection.recv(65536)
        except ConnectionError:  # refused by closing, also an answer
            answer = b""
    assert not answer.startswith(b"HTTP/1.1 5")
    assert httpx.get(f"{server.url}/healthz").status_code == 200


# --- Health and metrics -----------------------------------------------------------------------------------


async def test_ready_is_the_generators_word_remembered_for_a_while(client: httpx.AsyncClient, world: World) -> None:
    world.generator.is_ready = False
    answer = await client.get("/readyz")
    assert answer.status_code == 503 and "retry-after" in answer.headers
    assert (await client.get("/healthz")).status_code == 200
    world.generator.is_ready = True
    answers = await asyncio.gather(*(client.get("/readyz") for _ in range(10)))
    assert {answer.status_code for answer in answers} == {200} and world.generator.num_checks == 2


async def test_a_slow_check_goes_on_when_a_probe_gives_up(world: World) -> None:
    may_end = asyncio.Event()

    async def check_ready() -> None:
        world.generator.num_checks += 1
        await may_end.wait()

    app_world = world
    app_world.generator.check_ready = check_ready  # type: ignore[method-assign]
    # The router holds the method it was built with, so the app is built again over the same generator.
    app = build_api(
        generator=world.generator,
        catalogue=world.catalogue,
        files=world.files,
        jobs=world.jobs,
        upload_dir=world.upload_dir,
        limits=Limits(ready_s=0.05),
    )
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://rookery") as client:
        assert (await client.get("/readyz")).status_code == 503
        may_end.set()
        assert (await client.get("/readyz")).status_code == 200
    assert world.generator.num_checks == 1


async def test_metrics_count_by_route_template_and_tier_never_by_model(client: httpx.AsyncClient, world: World) -> None:
    await client.post(f"/models/{ADA}", json={"inputs": "a b", "parameters": {"max_new_tokens": 3}})
    await client.get(f"/v1/models/{ADA}")
    await client.get("/nothing/at/all")
    text = (await client.get("/metrics")).text
    assert 'rookery_requests_total{route="/models/{model:path}",status="200"} 1.0' in text
    assert 'rookery_requests_total{route="/v1/models/{model:path}",status="200"} 1.0' in text
    assert 'rookery_requests_total{route="other",status="404"} 1.0' in text
    assert 'rookery_time_to_first_token_seconds_count{tier="disk"} 1.0' in text
    assert "rookery_tokens_generated_total 3.0" in text and "rookery_prompt_tokens_total 2.0" in text
    assert "ada" not in text


async def test_a_caller_is_known_to_the_engine_by_a_hash_of_its_key(client: httpx.AsyncClient, world: World) -> None:
    async def ask(path: str, body: dict[str, object], authorization: str | None) -> str:
        headers = {} if authorization is None else {"authorization": authorization}
        (await client.post(path, json=body, headers=headers)).raise_for_status()
        return world.generator.requests[-1].caller

    completion: tuple[str, dict[str, object]] = ("/v1/completions", {"model": "fledgling", "prompt": "a"})
    generate: tuple[str, dict[str, object]] = ("/generate", {"inputs": "a"})
    names = [await ask(*route, f"Bearer {key}") for route in (completion, generate) for key in ("sk-one", "sk-two")]
    assert names[:2] == names[2:] and len(set(names)) == 2
    assert all(len(name) == 16 and "sk" not in name for name in names)
    for nobody in (None, "", "Bearer ", "Basic sk-one"):
        assert await ask(*completion, nobody) == ""
