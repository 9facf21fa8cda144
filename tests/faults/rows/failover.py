"""Generators that are killed or hang, and callers that leave: what becomes of texts under way."""

from __future__ import annotations

import asyncio
import signal
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import httpx

from serve.generator import LocalGenerator
from serve.settings import Settings
from serve.types import GenerationRequest
from tests.faults.live import MODELS, flock, publish
from tests.faults.resuming import measure
from tests.faults.row import Measured, row
from tests.faults.traffic import Ask, Outcome, Traffic, Verdict, differing, make_asks, undisturbed

_NUM_ASKS = 100  # different ones: each is asked once more of the service that is left alone


def _asks(num: int, num_tokens: tuple[int, int]) -> list[Ask]:
    return make_asks(MODELS, min(num, _NUM_ASKS), num_tokens=num_tokens)


def _compared(url: str, outcomes: Sequence[Outcome]) -> int:
    """How many of those that are whole have another text than the undisturbed service writes."""
    return len(differing(outcomes, undisturbed(url, (one.ask for one in outcomes))))


def _slowest(verdict: Verdict) -> str:
    return f"the slowest took {verdict.slowest_s:.1f} s"


@row(
    "F1",
    did="kill -9 of a generator every 10 s, 2 generators, 1,000 requests",
    expected="0 lost, 0 refused",
    minutes=4,
)
def killed_under_requests(folder: Path, share: float) -> Measured:
    wanted = max(20, round(1000 * share))
    with flock(folder / "data") as live:
        with Traffic(live.url, _asks(wanted, (20, 60)), unary=8, streams=0) as traffic:
            kills = live.kill_generators(traffic, wanted)
        live.wait_until_whole()
        verdict, num_other = traffic.verdict(), _compared(live.url, traffic.outcomes)
        resumed = live.count("rookery_generations_resumed_total")
    return Measured(
        f"{verdict.lost} of {verdict.requests:,} lost, {verdict.refused} refused, {kills} kills; {resumed:.0f} went to "
        f"another generator, {num_other} texts differ; {_slowest(verdict)}",
        verdict.lost == verdict.raw_500 == verdict.refused == 0 and resumed > 0,
        asdict(verdict),
    )


@row(
    "F1b",
    did="the same with 1 generator: nobody is left to go on",
    expected="no gap over 10 s, 0 raw 500",
    minutes=4,
)
def killed_alone(folder: Path, share: float) -> Measured:
    wanted = max(20, round(300 * share))
    with flock(folder / "data", generators=1) as live:
        with Traffic(live.url, _asks(wanted, (20, 60)), unary=4, streams=0) as traffic:
            kills = live.kill_generators(traffic, wanted)
        verdict = traffic.verdict()
    return Measured(
        f"longest gap {verdict.longest_gap_s:.1f} s, {verdict.raw_500} raw 500; {verdict.lost} of {verdict.requests:,} "
        f"lost, {verdict.refused} refused, {kills} kills",
        verdict.longest_gap_s <= 10 and verdict.raw_500 == verdict.lost == 0,
        asdict(verdict),
    )


@row(
    "F2",
    did="kill -9 of a generator every 10 s, 2 generators, 500 streams of 150 to 240 tokens",
    expected="all end in [DONE] or an error event",
    minutes=6,
)
def killed_under_streams(folder: Path, share: float) -> Measured:
    wanted = max(20, round(500 * share))
    with flock(folder / "data") as live:
        with Traffic(live.url, _asks(wanted, (150, 240)), unary=0, streams=8, timeout_s=180) as traffic:
            kills = live.kill_generators(traffic, wanted)
        live.wait_until_whole()
        verdict, ids = traffic.verdict(), live.resumed_ids()
        texts = undisturbed(live.url, (one.ask for one in traffic.outcomes))
    resumed = [one for one in traffic.outcomes if one.request_id in ids]
    others = [one for one in traffic.outcomes if one.request_id not in ids]
    return Measured(
        f"{verdict.whole} of {verdict.streams} in [DONE], {verdict.streams_told} in an error event, "
        f"{verdict.lost} lost; {len(resumed)} taken up mid-sentence in {kills} kills, of which "
        f"{len(differing(resumed, texts))} are not the undisturbed text ({len(differing(others, texts))} of the other "
        f"{len(others)}); {_slowest(verdict)}",
        verdict.lost == verdict.refused == 0 and len(resumed) > 0,
        asdict(verdict),
    )


@row(
    "F2b",
    did="a text cut at any token and taken up by 1 model's batch or by one of 8 models: 40 of each kind",
    expected="in float32 the undisturbed text; in bfloat16 told as it is",
    minutes=10,
)
def taken_up(folder: Path, share: float) -> Measured:
    found = list(measure(folder, max(1, round(40 * share))))
    return Measured(
        "; ".join(
            f"{one.weights}, {one.sampling}, {one.num_beside + 1} models: {one.num_differing} of {one.num_texts} differ"
            for one in found
        ),
        all(one.num_differing == 0 for one in found if one.weights == "float32"),
    )


@row(
    "F20b",
    did="SIGSTOP of 1 of 2 generators under 6 streams and 2 requests at a time: it hangs, and says nothing",
    expected="0 lost, each goes on elsewhere within 20 s, the hung one is replaced within 60 s",
    minutes=3,
)
def hung(folder: Path, share: float) -> Measured:
    del share  # one hang, which takes its time
    with flock(folder / "data") as live:
        with Traffic(live.url, _asks(_NUM_ASKS, (100, 200)), unary=2, streams=6) as traffic:
            traffic.wait_for(16)
            began = time.monotonic()
            pid = live.signal_generator(signal.SIGSTOP)
            while pid in live.service.replica_pids("generator"):
                time.sleep(0.2)
            live.wait_until_whole()
            replaced_s = time.monotonic() - began
        verdict, num_other = traffic.verdict(), _compared(live.url, traffic.outcomes)
        resumed = live.count("rookery_generations_resumed_total")
    return Measured(
        f"{verdict.lost} of {verdict.requests} lost, {verdict.refused} refused; {resumed:.0f} taken up elsewhere, "
        f"{num_other} texts differ; {_slowest(verdict)}; replaced after {replaced_s:.0f} s",
        verdict.lost == verdict.refused == verdict.streams_told == 0
        and resumed > 0
        and verdict.slowest_s < 20
        and replaced_s < 60,
        asdict(verdict),
    )


@row(
    "F21",
    did="clients close their sockets in the middle of a stream, one after another",
    expected="the engine writes 1 more token at most; its place is free within 0.5 s, none is left behind",
    minutes=2,
)
def left(folder: Path, share: float) -> Measured:
    wanted = max(5, round(200 * share))
    data = folder / "data"
    publish(data)
    more = asyncio.run(_tokens_after_leaving(data, wanted))
    with flock(folder / "live", generators=1, gateways=1) as live:
        freed_s = asyncio.run(_seconds_until_free(live.url, wanted))
        resident = httpx.get(f"{live.url}/v1/residents", timeout=30).json()["data"]
    num_leases = sum(one["leases"] for one in resident)
    return Measured(
        f"at most {max(more)} tokens more in {wanted} leaves; through the whole service free after "
        f"{statistics.median(freed_s) * 1000:.0f} ms (median), {max(freed_s) * 1000:.0f} ms (slowest); {num_leases} "
        "leases left",
        max(more) <= 1 and max(freed_s) <= 0.5 and num_leases == 0,
    )


async def _tokens_after_leaving(data: Path, num: int) -> list[int]:
    """How many the engine wrote of each text after its reader had closed it, while others were written."""
    settings = Settings(data=data, base=MODELS[0], dtype="float32", memory_bytes=1 << 29, hub_enabled=False)
    generator = LocalGenerator(settings)
    request = GenerationRequest(MODELS[1], ("I",), {"max_new_tokens": 200, "ignore_eos": True})
    more = []
    for _ in range(num):
        stream = generator.generate(request)
        for _ in range(3):
            await anext(stream)
        (sequence,) = generator._calls
        written = len(sequence.output_ids)
        await stream.aclose()  # type: ignore[attr-defined]
        while sequence.kv_row >= 0:
            await asyncio.sleep(0.001)
        more.append(len(sequence.output_ids) - written)
    await generator.close()
    return more


async def _seconds_until_free(url: str, num: int) -> list[float]:
    """From the closing of a socket until nothing is written or queued any more."""
    ask, found = Ask(MODELS[0], "I", 1, 200), []
    async with httpx.AsyncClient(base_url=url, timeout=60) as client:
        for _ in range(num):
            async with client.stream("POST", "/v1/completions", json=ask.body(is_streaming=True)) as response:
                await anext(response.aiter_lines())
            began = time.monotonic()
            while any(one["running"] + one["queued"] for one in (await client.get("/v1/replicas")).json()["data"]):
                pass
            found.append(time.monotonic() - began)
    return found
