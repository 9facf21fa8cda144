"""Other tools send the calls that ours sends, and what they measured is compared call by call."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest

from loadtest.client.noop import MODEL, start
from loadtest.outside.__main__ import LOCUSTFILE, Traffic, by_locust, by_openai
from loadtest.outside.measures import (
    Measure,
    answered_by_all,
    figures_of,
    ratios,
    read_measures,
    write_measures,
)
from loadtest.outside.openai_loop import play
from loadtest.traffic.changing import override
from loadtest.traffic.plan import Arrivals, Requests
from loadtest.traffic.reading import read_plan
from loadtest.traffic.schedule import schedule
from tests.loadtest.client_server import STREAM, Asked, chunk, event, scripted, token, usage, whole

PLAN = override(read_plan("outside"), duration_s=0.5, warmup_s=0, rate_scale=8)


@pytest.fixture
async def noop_url() -> AsyncIterator[str]:
    """A server whose streams take 20 ms to the first of 4 pieces, and then 10 ms a piece."""
    server, url = await start(num_pieces=4, gap_s=0.01, delay_s=0.02)
    async with server:
        yield url


def test_measures_are_read_as_they_were_written(tmp_path: Path) -> None:
    measures = [Measure(0, True, 12.5, 3.25, 40), Measure(1, False)]
    write_measures(tmp_path / "calls.jsonl", measures)
    assert read_measures(tmp_path / "calls.jsonl") == measures


def test_only_calls_that_everybody_saw_answered_in_every_round_are_compared() -> None:
    whole = [Measure(number, True) for number in range(4)]
    rounds = {"ours": [whole, whole], "theirs": [whole, [*whole[:2], Measure(2, False), Measure(3, True)]]}
    assert answered_by_all(rounds, {1, 2, 3, 9}) == {1, 3}


def test_a_hiccup_of_one_round_changes_no_figure() -> None:
    rounds = [[Measure(number, True, 110.0, 10.0, 21) for number in range(50)] for _ in range(3)]
    rounds[1][7] = Measure(7, True, 9000.0, 8000.0, 21)
    figures = figures_of(rounds, set(range(50)))
    assert (figures.p50_ms, figures.p99_ms, figures.p50_ttft_ms, figures.p99_ttft_ms) == (110, 110, 10, 10)
    assert figures.tokens_s == pytest.approx(200)


def test_ratios_are_theirs_over_ours() -> None:
    ours = figures_of([[Measure(0, True, 100.0, 10.0, 10)]], {0})
    theirs = figures_of([[Measure(0, True, 110.0, 20.0, 10)]], {0})
    assert ratios(ours, theirs) == pytest.approx(
        {"p50_ms": 1.1, "p99_ms": 1.1, "p50_ttft_ms": 2, "p99_ttft_ms": 2, "tokens_s": 1}
    )


async def test_the_openai_client_sends_all_calls_and_measures_what_the_server_takes(noop_url: str) -> None:
    measures = await play(PLAN, [MODEL], noop_url)
    calls = {call.number: call for call in schedule(PLAN, [MODEL])}
    assert [measure.number for measure in measures] == list(calls)
    for measure in measures:
        assert measure.ok
        assert measure.tokens == 4
        assert (measure.ttft_ms is not None) == calls[measure.number].is_streaming
        assert measure.took_ms > (49 if measure.ttft_ms is not None else 19)


async def test_the_openai_client_sends_the_key_and_a_flows_own_and_waits_for_a_token() -> None:
    async def answer(asked: Asked, writer: asyncio.StreamWriter) -> None:
        if asked.method == "GET":
            writer.write(whole({"object": "list", "data": []}, content_type="application/json"))
            return
        writer.write(STREAM + chunk(event({"choices": [{"index": 0, "finish_reason": "stop", "text": ""}]})))
        await writer.drain()
        await asyncio.sleep(0.02)
        writer.write(chunk(token() + usage(1, 1)) + chunk(b""))

    flow = replace(PLAN.flows[0], requests=Requests(), arrivals=Arrivals("constant", rate=10.0))
    plan = replace(PLAN, flows=(flow, replace(flow, name="own", key="of-the-flow")), duration_s=0.1)
    async with scripted(answer) as server:
        measures = await play(plan, [MODEL], server.url, "of-the-run")
    assert len(measures) == 2
    assert all(measure.ttft_ms is not None and measure.ttft_ms > 19 for measure in measures)
    sent = [asked.headers["authorization"] for asked in server.asked]
    assert sorted(sent) == ["Bearer of-the-flow", "Bearer of-the-run", "Bearer of-the-run"]


def test_a_key_is_given_to_the_tools_but_on_no_command_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    ran: list[tuple[list[str], str]] = []

    def run(command: list[str], *, env: dict[str, str], **_: object) -> subprocess.CompletedProcess[str]:
        ran.append((command, env["ROOKERY_API_KEY"]))
        (tmp_path / "calls").write_text("")
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(subprocess, "run", run)
    traffic = Traffic("outside", "http://x", ("m",), key="a-secret")
    for tool in (by_openai, by_locust):
        tool(traffic, tmp_path / "calls")
    assert [key for _, key in ran] == ["a-secret", "a-secret"]
    assert "a-secret" not in repr((traffic, [command for command, _ in ran]))


@pytest.mark.slow
@pytest.mark.skipif(find_spec("locust") is None, reason="Locust is not installed: pip install 'rookery[locust]'")
async def test_locust_sends_the_key_with_every_request(tmp_path: Path) -> None:
    async def answer(asked: Asked, writer: asyncio.StreamWriter) -> None:
        if asked.headers.get("authorization") != "Bearer a-secret":
            writer.write(whole({}, "401 No"))
        elif asked.method == "GET":
            writer.write(whole({"data": [{"id": MODEL}]}))
        else:
            writer.write(whole({"choices": [{"text": "a"}]}))

    (tmp_path / "short.toml").write_text("duration_s = 1\nwarmup_s = 0\n[requests]\nstreaming = 0\n")
    command = [sys.executable, "-m", "locust", "-f", str(LOCUSTFILE), "--headless", "--plan", "short.toml"]
    async with scripted(answer) as server:
        for key, code in (("a-secret", 0), ("", 2)):
            process = await asyncio.create_subprocess_exec(
                *command, "--host", server.url, stderr=subprocess.PIPE, cwd=tmp_path,
                env=os.environ | {"ROOKERY_API_KEY": key, "PYTHONPATH": str(LOCUSTFILE.parents[1])},
            )  # fmt: skip
            _, errors = await process.communicate()
            assert process.returncode == code, errors.decode()[-2000:]
    assert "answers /v1/models with 401; is there a --key?" in errors.decode()


@pytest.mark.slow  # Locust takes seconds to start
@pytest.mark.skipif(find_spec("locust") is None, reason="Locust is not installed: pip install 'rookery[locust]'")
async def test_locust_sends_all_calls_and_measures_what_the_server_takes(noop_url: str, tmp_path: Path) -> None:
    plan = override(read_plan("outside"), duration_s=2)
    command = [sys.executable, "-m", "locust", "-f", str(LOCUSTFILE), "--headless", "--plan", "outside"]
    options = ["--duration", "2", "--host", noop_url, "--calls", str(tmp_path / "calls.jsonl")]
    process = await asyncio.create_subprocess_exec(*command, *options, stderr=subprocess.PIPE)
    _, errors = await process.communicate()
    assert process.returncode == 0, errors.decode()[-2000:]
    measures = {measure.number: measure for measure in read_measures(tmp_path / "calls.jsonl")}
    for call in schedule(plan, [MODEL]):
        measure = measures.pop(call.number)
        assert measure.ok
        assert measure.tokens == 4
        assert (measure.ttft_ms is not None) == call.is_streaming
        assert measure.took_ms > (49 if call.is_streaming else 19)
    assert not measures


@pytest.mark.slow
@pytest.mark.skipif(find_spec("locust") is None, reason="Locust is not installed: pip install 'rookery[locust]'")
@pytest.mark.parametrize(("patience_s", "timeout_s"), [(0.1, 60), (1000, 0.5)])
async def test_locust_hangs_up_where_the_plan_says_so_and_says_when_a_plan_cannot_be_played(
    tmp_path: Path, patience_s: float, timeout_s: float
) -> None:
    server, url = await start(num_pieces=100, gap_s=0.05)
    (tmp_path / "leaving.toml").write_text(
        f"duration_s = 1\nwarmup_s = 0\ntimeout_s = {timeout_s}\n"
        f"[arrivals]\nrate = 10\n[requests]\ncancelled = 1\npatience_s = {patience_s}"
    )
    command = [sys.executable, "-m", "locust", "-f", str(LOCUSTFILE), "--headless", "--host", url]
    async with server:
        calls = str(tmp_path / "calls.jsonl")
        done = await asyncio.create_subprocess_exec(
            *command, "--plan", str(tmp_path / "leaving.toml"), "--calls", calls, stderr=subprocess.PIPE
        )
        await done.communicate()
        refused = await asyncio.create_subprocess_exec(*command, "--plan", "steady", stderr=subprocess.PIPE)
        _, errors = await refused.communicate()
    assert not any(json.loads(line)["ok"] for line in Path(calls).read_text().splitlines())
    assert refused.returncode == 2
    assert "that was not measured" in errors.decode()


@pytest.mark.slow
@pytest.mark.timeout(300)
async def test_the_comparison_ends_with_a_line_of_ratios(noop_url: str) -> None:
    command = [sys.executable, "-m", "loadtest.outside", "--url", noop_url, "--models", MODEL]
    process = await asyncio.create_subprocess_exec(
        *command, "--rounds", "1", "--duration", "2", stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    out, errors = await process.communicate()
    assert process.returncode == 0, errors.decode()[-2000:]
    values = json.loads(out.splitlines()[-1])
    assert values["compared"] == values["calls"] > 0
    assert set(values["ratios"]["openai"]) == {"p50_ms", "p99_ms", "p50_ttft_ms", "p99_ttft_ms", "tokens_s"}
