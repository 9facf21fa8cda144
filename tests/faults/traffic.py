"""Requests that never stop while a service is broken, and what became of each.

    asks = make_asks(["tiny/base"], 200)                      # each with its own seed; they are asked over and over
    with Traffic(url, asks, unary=4, streams=4) as traffic:   # a thread of its own: meanwhile, do your worst
        traffic.wait_for(1000)                                # outcomes
    traffic.outcomes                                          # an `Outcome` a request, in the order they ended
    verdict = traffic.verdict()                               # counts: lost, raw_500, streams_cut, longest_gap_s, ...
    texts = undisturbed(url, asks)                            # one after another, from a service that is left alone
    differing(traffic.outcomes, texts)                        # those that are whole, and have another text

No request is sent again: what a client that retries would see is better. `with` ends when the last answer has come, or
`timeout_s` after its request was sent.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import random
import threading
import time
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Literal

import httpx

from tests.deployments.conftest import wait_until

# whole: the answer, or the stream up to [DONE]. told: a stream whose last event is an error. refused: a 4xx, or with
# Retry-After a 503 or a 507 (the disk is full). error: any other status. cut: begun, and broken off without a word; so
# is an answer of no bytes.
Ended = Literal["whole", "told", "refused", "error", "cut", "unreached", "timeout"]

_PROMPTS = ("My dream is", "I think", "Today we are", "Don't forget:")
_PAUSE_S = 0.05


@dataclass(frozen=True, slots=True)
class Ask:
    """A request whose text is decided by what it says. `temperature` 0 is greedy."""

    model: str
    prompt: str
    seed: int
    max_tokens: int
    temperature: float = 1.0
    num_choices: int = 1

    def body(self, *, is_streaming: bool) -> dict[str, Any]:
        """For /v1/completions. `ignore_eos`: so that it is as long as it says."""
        return {
            "model": self.model,
            "prompt": self.prompt,
            "seed": self.seed,
            "max_tokens": self.max_tokens,
            "temperature": self.temperature,
            "n": self.num_choices,
            "ignore_eos": True,
            "stream": is_streaming,
        }


def make_asks(
    models: Sequence[str], num: int, *, seed: int = 0, num_tokens: tuple[int, int] = (20, 50), num_choices: int = 1
) -> list[Ask]:
    """`num` different ones, a quarter of them greedy; the same for the same arguments."""
    draw = random.Random(seed)
    return [
        Ask(
            model=draw.choice(models),
            prompt=draw.choice(_PROMPTS),
            seed=number,
            max_tokens=draw.randint(*num_tokens),
            temperature=0.0 if number % 4 == 0 else 1.0,
            num_choices=num_choices,
        )
        for number in range(num)
    ]


@dataclass(slots=True)
class Outcome:
    """What became of one request. Times by `time.monotonic`."""

    ask: Ask
    is_stream: bool
    began_s: float
    ended_s: float = 0.0
    first_s: float | None = None  # when the first text of a stream came
    status: int = 0  # of HTTP; 0 without an answer
    ended: Ended = "unreached"
    error: str = ""  # the service's code, or the kind of what broke
    request_id: str = ""
    texts: dict[int, str] = field(default_factory=dict)  # of each choice, as far as it came

    @property
    def is_lost(self) -> bool:
        """Neither answered nor told what to do instead."""
        return self.ended not in ("whole", "told", "refused")


@dataclass(frozen=True, slots=True)
class Verdict:
    """Counts of outcomes."""

    requests: int
    lost: int  # of them, whole answers and streams alike: error, cut, unreached or timeout
    raw_500: int  # a status from 500 on that does not say when to come back
    refused: int
    streams: int
    streams_told: int
    streams_cut: int
    longest_gap_s: float  # in which no request became whole
    slowest_s: float  # of those that did
    errors: Mapping[str, int]  # ended, status, code -> how often

    @property
    def whole(self) -> int:
        return self.requests - self.lost - self.refused - self.streams_told


def verdict_of(outcomes: Sequence[Outcome]) -> Verdict:
    """Of one run: gaps are between its first request and its last answer."""
    whole = [one for one in outcomes if one.ended == "whole"]
    broken = [f"{one.ended} {one.status} {one.error}" for one in outcomes if one.ended != "whole"]
    marks = sorted([min(one.began_s for one in outcomes), *(one.ended_s for one in whole)]) if outcomes else []
    return Verdict(
        requests=len(outcomes),
        lost=sum(one.is_lost for one in outcomes),
        raw_500=sum(one.ended == "error" and one.status >= 500 for one in outcomes),
        refused=sum(one.ended == "refused" for one in outcomes),
        streams=sum(one.is_stream for one in outcomes),
        streams_told=sum(one.ended == "told" for one in outcomes),
        streams_cut=sum(one.is_stream and one.ended == "cut" for one in outcomes),
        longest_gap_s=max((after - before for before, after in itertools.pairwise(marks)), default=0.0),
        slowest_s=max((one.ended_s - one.began_s for one in whole), default=0.0),
        errors={what: broken.count(what) for what in sorted(set(broken))},
    )


class Traffic:
    """Keeps `unary` whole answers and `streams` streams under way from `with` to its end."""

    def __init__(
        self,
        url: str,
        asks: Sequence[Ask],
        *,
        unary: int = 4,
        streams: int = 4,
        pause_s: float = _PAUSE_S,  # after each answer, of each that asks: 0 is as fast as it goes
        timeout_s: float = 60.0,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        self.outcomes: list[Outcome] = []
        self._url, self._asks, self._headers = url, itertools.cycle(asks), headers
        self._unary, self._streams = unary, streams
        self._pause_s, self._timeout_s = pause_s, timeout_s
        self._is_over = threading.Event()
        self._ended: Future[None] = Future()

    def wait_for(self, num_outcomes: int, timeout_s: float = 600.0) -> None:
        """Until so many requests have ended. Raises: AssertionError when they have not in time."""
        wait_until(lambda: len(self.outcomes) >= num_outcomes or self._ended.done(), timeout_s)

    def verdict(self) -> Verdict:
        return verdict_of(self.outcomes)

    def __enter__(self) -> Traffic:
        threading.Thread(target=self._run, name="traffic", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self._ended.result(self._timeout_s + 30)

    def _run(self) -> None:
        try:
            asyncio.run(self._play())
        except BaseException as exc:
            self._ended.set_exception(exc)
        else:
            self._ended.set_result(None)

    async def _play(self) -> None:
        async with _client(self._url, self._headers) as client, asyncio.TaskGroup() as group:
            for number in range(self._unary + self._streams):
                group.create_task(self._keep_asking(client, is_stream=number >= self._unary))

    async def _keep_asking(self, client: httpx.AsyncClient, *, is_stream: bool) -> None:
        while not self._is_over.is_set():
            outcome = await ask(client, next(self._asks), is_stream=is_stream, timeout_s=self._timeout_s)
            self.outcomes.append(outcome)
            await asyncio.sleep(self._pause_s)


async def ask(client: httpx.AsyncClient, one: Ask, *, is_stream: bool, timeout_s: float = 60.0) -> Outcome:
    """Asks once; whatever happens is in the outcome."""
    outcome = Outcome(one, is_stream, began_s=time.monotonic())
    try:
        async with (
            asyncio.timeout(timeout_s),
            client.stream("POST", "/v1/completions", json=one.body(is_streaming=is_stream)) as response,
        ):
            outcome.status, outcome.ended = response.status_code, "cut"
            outcome.request_id = response.headers.get("x-request-id", "")
            if response.status_code != 200:
                _refused(outcome, response, await response.aread())
            elif is_stream:
                await _read_stream(outcome, response)
            else:
                _add(outcome, json.loads(await response.aread()))
                outcome.ended = "whole"
    except TimeoutError:
        outcome.ended, outcome.error = "timeout", "timeout"
    except httpx.ConnectError as exc:
        outcome.error = type(exc).__name__
    except httpx.HTTPError as exc:
        outcome.ended, outcome.error = "cut", type(exc).__name__
    outcome.ended_s = time.monotonic()
    return outcome


def undisturbed(url: str, asks: Iterable[Ask]) -> dict[Ask, dict[int, str]]:
    """The texts of each, asked one after another. Raises: AssertionError where one has no answer."""

    async def play() -> dict[Ask, dict[int, str]]:
        async with _client(url) as client:
            outcomes = [await ask(client, one, is_stream=False) for one in dict.fromkeys(asks)]
        assert all(one.ended == "whole" for one in outcomes), verdict_of(outcomes).errors
        return {one.ask: one.texts for one in outcomes}

    return asyncio.run(play())


def differing(outcomes: Iterable[Outcome], texts: Mapping[Ask, dict[int, str]]) -> list[Outcome]:
    """Whole ones whose text is not that of the undisturbed service, of those in `texts`."""
    return [one for one in outcomes if one.ended == "whole" and one.texts != texts.get(one.ask, one.texts)]


def _client(url: str, headers: Mapping[str, str] | None = None) -> httpx.AsyncClient:
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)  # no stale connection is to blame
    return httpx.AsyncClient(base_url=url, headers=headers, limits=limits, timeout=None)


def _refused(outcome: Outcome, response: httpx.Response, content: bytes) -> None:
    is_clear = response.status_code < 500 or (response.status_code in (503, 507) and "retry-after" in response.headers)
    outcome.ended = "refused" if is_clear else "error"
    try:
        outcome.error = str(json.loads(content)["error"]["code"])
    except (ValueError, KeyError, TypeError):
        outcome.error = "no error body"


async def _read_stream(outcome: Outcome, response: httpx.Response) -> None:
    async for event in _events(response):
        if event == "[DONE]":
            outcome.ended = "whole"
        elif "error" in (chunk := json.loads(event)):
            outcome.ended, outcome.error = "told", str(chunk["error"].get("code"))
        else:
            _add(outcome, chunk)


async def _events(response: httpx.Response) -> AsyncIterator[str]:
    async for line in response.aiter_lines():
        if line.startswith("data: "):
            yield line.removeprefix("data: ")


def _add(outcome: Outcome, chunk: dict[str, Any]) -> None:
    for choice in chunk["choices"]:
        if outcome.first_s is None and choice["text"]:
            outcome.first_s = time.monotonic()
        outcome.texts[choice["index"]] = outcome.texts.get(choice["index"], "") + choice["text"]
