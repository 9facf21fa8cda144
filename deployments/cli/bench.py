"""`rookery bench`: a short load on a running server, as its users would feel it.

A closed loop of streams: each asks again as soon as it has its text. Knows HTTP and the clock alone; what the server
does within, and how others do the same work, is measured elsewhere.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import math
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Annotated

import httpx
import typer

from deployments import show
from deployments.cli.app import LOOK, Exit, command
from deployments.cli.options import DEFAULT_URL, AsJson, Url, console, print_json, remark
from deployments.cli.words import complete_models
from deployments.client import Client, Json, uses_proxy
from serve.errors import NotFound
from serve.types import PREVIEW_PROMPT

_BUSY = 0.8  # of a core: a client that needs more may itself be what is slow
_PAUSE_S = 0.1  # after a refusal
_COLUMNS = ("at once ", "tokens/s ", "TTFT p50 ", "TTFT p99 ", "ITL p50 ", "texts ", "errors")
_TIMEOUT = httpx.Timeout(120.0, connect=10.0)


@dataclass(slots=True)
class Text:
    """One text as it came; seconds of one clock."""

    asked: float
    first: float = math.nan
    last: float = math.nan
    num_tokens: int = 0
    error: str = ""

    def note(self, event: Json, now: float) -> None:
        """Takes an event of the stream."""
        if "error" in event:
            self.error = str(event["error"].get("code") or "error")
        if event.get("choices"):
            self.first = now if math.isnan(self.first) else self.first
            self.last = now
        if usage := event.get("usage"):
            self.num_tokens = usage["completion_tokens"]

    def num_tokens_by(self, until: float) -> float:
        """As if they had come evenly."""
        if self.last <= until:
            return self.num_tokens
        return self.num_tokens * max(0.0, until - self.first) / (self.last - self.first or 1.0)


@dataclass(frozen=True, slots=True)
class Load:
    """What the streams ask for, in turn: each text by the next bot with the next seed."""

    models: Sequence[str]
    max_tokens: int
    numbers: Iterator[int] = field(default_factory=itertools.count)

    def next_body(self) -> Json:
        """All texts have the same length, whatever the model would have done."""
        number = next(self.numbers)
        body = {"prompt": PREVIEW_PROMPT, "max_tokens": self.max_tokens, "min_tokens": self.max_tokens, "add_bos": True}
        model = self.models[number % len(self.models)]
        return {**body, "model": model, "seed": number, "stream": True, "stream_options": {"include_usage": True}}


@dataclass(frozen=True, slots=True)
class Level:
    """What so many streams at once got. Milliseconds; None where nothing came."""

    streams: int
    seconds: float
    texts: int
    tokens_per_s: float
    ttft_p50_ms: float | None
    ttft_p99_ms: float | None
    itl_p50_ms: float | None
    client_cpu: float  # of a core
    errors: dict[str, int] = field(default_factory=dict)


@command(
    LOOK,
    """
    rookery bench
    rookery bench --models 8 --streams 1,32 --seconds 20
    rookery bench huggingtweets/ada huggingtweets/bob --json
    """,
)
def bench(
    models: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[MODEL]...", help="Who writes; else the server's first bots.", autocompletion=complete_models
        ),
    ] = None,
    num_models: Annotated[
        int, typer.Option("--models", min=1, max=1000, help="Over how many bots the streams are spread, if unnamed.")
    ] = 1,
    streams: Annotated[str, typer.Option(help="How many streams at once, one level after the other.")] = "1,8,32",
    seconds: Annotated[float, typer.Option(min=0.1, max=3600.0, help="How long each level takes.")] = 10.0,
    max_tokens: Annotated[int, typer.Option(min=2, max=1000, help="The length of each text.")] = 60,
    url: Url = DEFAULT_URL,
    as_json: AsJson = False,
) -> None:
    """Measure how fast a running server writes: tokens a second, time to the first token (TTFT), time between (ITL).

    Each bot writes a text before the clock runs, so that loading is not measured. Each stream asks again as soon as it
    has its text, which flatters a server that is slow: it is asked less often. ITL is a text's time after its first
    piece over its other tokens. Ends with 1 where every request failed.
    """
    counts = _parse_streams(streams)
    with Client(url) as client:
        chosen = models or _choose(client, num_models)
        for model in chosen:
            client.complete({"model": model, "prompt": PREVIEW_PROMPT, "max_tokens": 1})
        levels = asyncio.run(_measure(client.url, client.key, Load(chosen, max_tokens), counts, seconds))
    if as_json:
        print_json({"object": "bench", "url": url, "models": chosen, "levels": [asdict(level) for level in levels]})
    else:
        console.print(show.table(*_COLUMNS, rows=[_row(level) for level in levels]))
    if num_failed := sum(sum(level.errors.values()) for level in levels):
        num_asked = num_failed + sum(level.texts for level in levels)
        remark(f"{num_failed:,} of {num_asked:,} requests failed: do not use these figures.")
    if any(level.client_cpu > _BUSY for level in levels):
        remark("This client was busy all the time: the server may be faster than it can tell.")
    if not any(level.texts for level in levels):
        raise typer.Exit(Exit.REFUSED)


def _parse_streams(text: str) -> list[int]:
    try:
        counts = [int(part) for part in text.split(",")]
    except ValueError:
        counts = []
    if not counts or not all(1 <= count <= 1024 for count in counts):
        raise typer.BadParameter(
            "write numbers from 1 to 1024 with commas between, as in 1,8,32.", param_hint="--streams"
        )
    return counts


def _choose(client: Client, num_models: int) -> list[str]:
    """The first bots; where there is none, the base. Raises: NotFound where there are fewer."""
    listed = client.list_models(limit=min(num_models + 10, 1000))["data"]
    bots = sorted(listed, key=lambda model: model["base_model"] is None)[:num_models]  # a stable sort: bases go last
    if len(bots) < num_models:
        raise NotFound(f"The server has {len(bots)} models, not {num_models}; pull or train more, or ask for fewer.")
    return [model["id"] for model in bots]


# --- The load ---------------------------------------------------------------------------------------------


async def _measure(url: str, key: str, load: Load, counts: Sequence[int], seconds: float) -> list[Level]:
    async with httpx.AsyncClient(
        base_url=url,
        headers={"authorization": f"Bearer {key}"} if key else {},
        timeout=_TIMEOUT,
        limits=httpx.Limits(max_connections=None),
        trust_env=uses_proxy(url),
    ) as http:
        levels = []
        for count in counts:
            remark(f"{count} at once, for {seconds:g} s ...")
            await asyncio.gather(*(_read_text(http, load.next_body()) for _ in range(count)))  # a batch so large is new
            levels.append(await _run_level(http, load, count, seconds))
        return levels


async def _run_level(http: httpx.AsyncClient, load: Load, count: int, seconds: float) -> Level:
    texts: list[Text] = []
    started, cpu = time.perf_counter(), time.process_time()
    until = started + seconds

    async def ask_again() -> None:
        while time.perf_counter() < until:
            texts.append(await _read_text(http, load.next_body()))
            if texts[-1].error:
                await asyncio.sleep(_PAUSE_S)

    await asyncio.gather(*(ask_again() for _ in range(count)))
    client_cpu = (time.process_time() - cpu) / (time.perf_counter() - started)
    return summarize(texts, count, seconds, until, client_cpu)


async def _read_text(http: httpx.AsyncClient, body: Json) -> Text:
    text = Text(asked=time.perf_counter())
    try:
        async with http.stream("POST", "/v1/completions", json=body) as response:
            if not response.is_success:
                text.error = str(response.status_code)
                return text
            async for line in response.aiter_lines():
                if line.startswith("data: {"):
                    text.note(json.loads(line.removeprefix("data: ")), time.perf_counter())
    except (httpx.HTTPError, ValueError) as exc:
        text.error = type(exc).__name__
    text.error = text.error or ("" if text.num_tokens else "broke off")
    return text


# --- The figures ------------------------------------------------------------------------------------------


def summarize(texts: Sequence[Text], streams: int, seconds: float, until: float, client_cpu: float) -> Level:
    """A text that was not over at `until` counts with the part of its tokens that had come by then."""
    done = [text for text in texts if not text.error]
    first_ms = [1e3 * (text.first - text.asked) for text in done]
    between_ms = [1e3 * (text.last - text.first) / (text.num_tokens - 1) for text in done if text.num_tokens > 1]
    return Level(
        streams=streams,
        seconds=seconds,
        texts=len(done),
        tokens_per_s=round(sum(text.num_tokens_by(until) for text in done) / seconds, 1),
        ttft_p50_ms=_percentile(first_ms, 50),
        ttft_p99_ms=_percentile(first_ms, 99),
        itl_p50_ms=_percentile(between_ms, 50),
        client_cpu=round(client_cpu, 2),
        errors=dict(Counter(text.error for text in texts if text.error)),
    )


def _percentile(values: Iterable[float], percent: int) -> float | None:
    """The nearest rank: a value that was there."""
    ranked = sorted(values)
    return round(ranked[math.ceil(len(ranked) * percent / 100) - 1], 2) if ranked else None


def _row(level: Level) -> list[object]:
    times = (level.ttft_p50_ms, level.ttft_p99_ms, level.itl_p50_ms)
    errors = ", ".join(f"{count} x {kind}" for kind, count in level.errors.items())
    shown = ["-" if one is None else f"{one:,.1f} ms" for one in times]
    return [level.streams, f"{level.tokens_per_s:,.0f}", *shown, level.texts, errors or "none"]
