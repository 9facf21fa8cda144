"""The `openai` package as a load tester: every call when it is due, timed where its user would time it.

python -m loadtest.outside.openai_loop --plan outside --models a,b --url http://127.0.0.1:8000 --calls FILE
"""

from __future__ import annotations

import argparse
import asyncio
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from openai import AsyncOpenAI, OpenAIError

from loadtest.outside.measures import Measure, write_measures
from loadtest.traffic.changing import override
from loadtest.traffic.plan import Call, Plan, Requests
from loadtest.traffic.reading import read_plan
from loadtest.traffic.schedule import schedule


async def play(plan: Plan, models: Sequence[str], url: str, key: str = "") -> list[Measure]:
    """What it measured of each call."""
    requests = {flow.name: flow.requests for flow in plan.flows}
    async with AsyncOpenAI(
        base_url=f"{url.rstrip('/')}/v1", api_key=key or "none", max_retries=0, timeout=plan.timeout_s
    ) as client:
        of_flow = {flow.name: client.with_options(api_key=flow.key) if flow.key else client for flow in plan.flows}
        await client.models.list()  # the first question of a client reads its certificates
        asking, started = [], time.perf_counter()
        for call in schedule(plan, models):
            await asyncio.sleep(max(0.0, call.at_s - (time.perf_counter() - started)))
            asking.append(asyncio.create_task(_ask(of_flow[call.flow], call, requests[call.flow])))
        return await asyncio.gather(*asking)


async def _ask(client: AsyncOpenAI, call: Call, requests: Requests) -> Measure:
    try:
        return await (_ask_for_stream if call.is_streaming else _ask_for_all)(client, call, requests)
    except (OpenAIError, OSError):
        return Measure(call.number, ok=False)


async def _ask_for_all(client: AsyncOpenAI, call: Call, requests: Requests) -> Measure:
    sent = time.perf_counter()
    answer = await client.completions.create(**_asked(call, requests))
    took_ms = (time.perf_counter() - sent) * 1000
    return Measure(call.number, True, took_ms, tokens=answer.usage.completion_tokens if answer.usage else 0)


async def _ask_for_stream(client: AsyncOpenAI, call: Call, requests: Requests) -> Measure:
    first_ms, tokens, sent = None, 0, time.perf_counter()
    pieces = await client.completions.create(
        **_asked(call, requests), stream=True, stream_options={"include_usage": True}
    )
    async for piece in pieces:
        if first_ms is None and any(choice.text or choice.finish_reason is None for choice in piece.choices):
            first_ms = (time.perf_counter() - sent) * 1000
        if piece.usage is not None:
            tokens = piece.usage.completion_tokens
    return Measure(call.number, tokens > 0, (time.perf_counter() - sent) * 1000, first_ms, tokens)


def _asked(call: Call, requests: Requests) -> dict[str, Any]:
    return {
        "model": call.model,
        "prompt": call.prompt,
        "max_tokens": call.num_tokens,
        "temperature": requests.temperature,
        "top_p": requests.top_p,
        "seed": call.seed,
        "n": call.num_choices,
        "extra_body": {} if requests.ends_freely else {"min_tokens": call.num_tokens},
    }


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--plan", default="outside")
    parser.add_argument("--models", required=True)
    parser.add_argument("--url", required=True)
    parser.add_argument("--key", default=os.environ.get("ROOKERY_API_KEY", ""))
    parser.add_argument("--calls", type=Path, required=True)
    parser.add_argument("--rate-scale", type=float, default=1.0)
    parser.add_argument("--duration", type=float)
    parser.add_argument("--seed", type=int)
    options = parser.parse_args()
    plan = read_plan(options.plan)
    plan = override(plan, rate_scale=options.rate_scale, duration_s=options.duration, seed=options.seed)
    write_measures(options.calls, asyncio.run(play(plan, options.models.split(","), options.url, options.key)))


if __name__ == "__main__":
    main()
