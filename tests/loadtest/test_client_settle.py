from __future__ import annotations

import asyncio
import socket
from dataclasses import replace

import pytest

from loadtest.client.facts import Server, Unreachable, Unusable, look_at
from loadtest.client.settle import settle, total_rate
from loadtest.client.target import Target
from loadtest.traffic.plan import Arrivals, BadPlan, Flow, Models, Plan
from tests.loadtest.client_server import Asked, scripted, whole

TARGET = Target("http://127.0.0.1:9")
PLAN = Plan("p", "", (Flow("a", models=Models(count=3)), Flow("b", models=Models(first=3, count=2))))
ABOUT_MEMORY = replace(PLAN, flows=(Flow("a", models=Models(times_fit=2.0)),))


async def rookery(asked: Asked, writer: asyncio.StreamWriter) -> None:
    """Two replicas with room for 4 and 6 models, of which one holds the model that was asked for."""
    resident = {"model": "other", "tier": "host", "bytes": 25}
    answers = {
        "/v1/status": {"version": "1", "base_model": "a-base", "ready": True},
        "/v1/models?limit=1000": {"data": [{"id": "a-base"}, {"id": "bench/m0"}], "has_more": True},
        "/v1/models?limit=1000&after=bench/m0": {"data": [{"id": "bench/m1"}, {"id": "other"}], "has_more": False},
        "/v1/completions": {"choices": [{"text": "a"}]},
        "/v1/replicas": {
            "data": [
                {"device": "cpu", "dtype": "bfloat16", "budget_bytes": 100, "residents": [resident]},
                {"device": "cpu", "dtype": "bfloat16", "budget_bytes": 174, "residents": []},
            ]
        },
    }
    writer.write(whole(answers[asked.path]))


async def test_a_server_tells_its_models_and_how_many_fit() -> None:
    async with scripted(rookery) as server:
        found = await look_at(Target(server.url))
    assert found.models == ("bench/m0", "bench/m1", "other", "a-base")  # bots before what they were made from
    assert found.models_that_fit == 10
    (probed,) = (asked.json["model"] for asked in server.asked if asked.method == "POST")
    assert probed == "other"  # the last of them, which a plan asks for least, and not the base
    assert found.told["models_that_fit"] == 10 and found.told["devices"] == ["cpu bfloat16"]


async def test_models_are_chosen_by_name_and_by_how_they_begin() -> None:
    async with scripted(rookery) as server:
        found = await look_at(Target(server.url), patterns=["unlisted", "bench/*"], is_fit_needed=False)
    assert found.models == ("unlisted", "bench/m0", "bench/m1")
    assert found.models_that_fit is None


async def test_a_server_that_tells_nothing_but_its_models_will_do() -> None:
    async def answer(asked: Asked, writer: asyncio.StreamWriter) -> None:
        is_list = asked.path.startswith("/v1/models")
        writer.write(whole({"data": [{"id": "m"}]}) if is_list else whole(b"<html>", "404 Not Found"))

    async with scripted(answer) as server:
        found = await look_at(Target(server.url))
    assert (found.models, found.models_that_fit) == (("m",), None)


async def test_nobody_at_the_address_is_said_with_the_address() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{probe.getsockname()[1]}"
        with pytest.raises(Unreachable, match=url):
            await look_at(Target(url))


@pytest.mark.parametrize(
    ("status", "body", "key", "said"),
    [
        ("401 No", {"error": {"code": "missing_api_key"}}, "", "/v1/models with 401, missing_api_key; give --key"),
        ("403 No", b"<html>", "wrong", "/v1/models with 403; give another --key"),
        ("500 Oh", {}, "", "/v1/models with 500"),
        ("404 No", {}, "", "/v1/models with 404"),
        ("200 OK", b"<html>", "", "does not list its models"),
        ("200 OK", {"data": 5}, "", "does not list its models"),
        ("200 OK", {"data": ["m"]}, "", "does not list its models"),
    ],
)
async def test_a_server_that_lists_nothing_is_told_by_its_status_and_code(
    status: str, body: object, key: str, said: str
) -> None:
    async def answer(asked: Asked, writer: asyncio.StreamWriter) -> None:
        writer.write(whole(b"", "404 No") if asked.path == "/v1/status" else whole(body, status))

    async with scripted(answer) as server:
        with pytest.raises(Unusable) as caught:
            await look_at(Target(server.url, key=key))
    assert said in str(caught.value)
    assert not isinstance(caught.value, Unreachable)


async def test_a_key_that_is_missing_is_said_where_even_the_status_needs_one() -> None:
    async def answer(asked: Asked, writer: asyncio.StreamWriter) -> None:
        writer.write(whole({}, "401 No"))

    async with scripted(answer) as server:
        with pytest.raises(Unusable, match="/v1/status with 401; give --key"):
            await look_at(Target(server.url))


async def test_pages_without_end_and_models_without_a_name_are_borne() -> None:
    async def answer(asked: Asked, writer: asyncio.StreamWriter) -> None:
        data = [{"id": "a&b=c d"}, {}, {"id": 7}, {"id": ""}]
        writer.write(whole({"data": data, "has_more": True, "budget_bytes": 1} if "models" in asked.path else {}))

    async with scripted(answer) as server:
        found = await look_at(Target(server.url), is_fit_needed=False)
    assert found.models == ("a&b=c d",)
    assert server.asked[-1].path == "/v1/models?limit=1000&after=a%26b%3Dc%20d"
    assert len(server.asked) == 3


@pytest.mark.parametrize(
    "replica",
    [{"residents": [{"model": "m", "bytes": 25}]} | {"budget_bytes": "x"}, {"residents": 5}, {"residents": ["m"]}, 5],
)
async def test_replicas_that_cannot_be_read_are_none(replica: object) -> None:
    async def answer(asked: Asked, writer: asyncio.StreamWriter) -> None:
        writer.write(whole({"data": [replica] if "replicas" in asked.path else [{"id": "m"}]}))

    async with scripted(answer) as server:
        found = await look_at(Target(server.url))
    assert (found.models, found.models_that_fit) == (("m",), None)


async def test_a_status_whose_numbers_are_none_is_left_out() -> None:
    async def answer(asked: Asked, writer: asyncio.StreamWriter) -> None:
        writer.write(whole(b'{"replicas": 1e999}' if "status" in asked.path else {"data": [{"id": "m"}]}))

    async with scripted(answer) as server:
        found = await look_at(Target(server.url), is_fit_needed=False)
    assert dict(found.told) == {"models_listed": 1}


async def test_a_plan_is_played_with_the_models_that_there_are_and_says_so() -> None:
    settled = await settle(PLAN, TARGET, Server(("m0", "m1")))
    assert [(flow.models.first, flow.models.count) for flow in settled.plan.flows] == [(0, 2), (0, 2)]
    (note,) = settled.notes
    assert "5 models" in note and "2:" in note


async def test_enough_models_are_no_reason_for_a_note() -> None:
    settled = await settle(PLAN, TARGET, Server(tuple("abcdef")))
    assert (settled.plan, settled.notes) == (PLAN, ())


async def test_a_plan_about_memory_wants_as_many_models_as_it_says() -> None:
    server = Server(("m0", "m1"), models_that_fit=2)
    assert (await settle(ABOUT_MEMORY, TARGET, server)).plan.num_models == 4  # the schedule will refuse it
    named = await settle(ABOUT_MEMORY, TARGET, server, are_models_named=True)
    assert named.plan.num_models == 2 and named.notes


async def test_where_the_server_does_not_say_what_fits_named_models_do() -> None:
    with pytest.raises(BadPlan, match="--models"):
        await settle(ABOUT_MEMORY, TARGET, Server(("m0", "m1")))
    named = await settle(ABOUT_MEMORY, TARGET, Server(("m0", "m1")), are_models_named=True)
    assert named.plan.num_models == 2


async def test_rates_are_multiples_of_what_the_server_did() -> None:
    at_work = asyncio.Semaphore(8)

    async def answer(asked: Asked, writer: asyncio.StreamWriter) -> None:
        async with at_work:
            await asyncio.sleep(0.05)
        writer.write(whole({"choices": [{"text": "a"}], "usage": {"completion_tokens": 1}}))

    flow = Flow("a", Arrivals(times_capacity=3.0))
    flow = replace(flow, requests=replace(flow.requests, streaming=0.0))
    async with scripted(answer) as server:
        settled = await settle(
            replace(PLAN, flows=(flow,)), Target(server.url), Server(("m0",)), probe_s=0.3, warmup_s=0.05
        )
    rate = settled.plan.flows[0].arrivals.rate
    assert rate == pytest.approx(3 * settled.facts["capacity_rps"], rel=0.01)
    assert 0 < rate <= 3 * 8 * 1.3 / 0.05  # of a window of six turns
    assert settled.facts["capacity_clients"] >= 32
    assert not settled.plan.needs_capacity


def test_a_plan_without_a_rate_has_no_total() -> None:
    assert total_rate(PLAN) == 2.0
    with pytest.raises(BadPlan, match="closed"):
        total_rate(replace(PLAN, flows=(Flow("a", Arrivals("closed")),)))
