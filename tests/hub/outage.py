"""A Hub that goes bad in every way, under a live service whose callers want models that are here and some that are not.

`outage(minutes)` gives the figures. The service has room for half of the models, so that they keep coming back from
disk; what is asked of the Hub meanwhile for any of them, and every answer that is not a text, counts as a failure.
"""

from __future__ import annotations

import asyncio
import math
import random
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from tests.deployments.conftest import BASE, LiveService, import_tiny_model, start_service, stop_service
from tests.fakes.hub import FakeHub, Fault, fake_hub
from tests.fakes.models import write_tiny_gpt2

NUM_CACHED = 24  # of 4 MB each; the service has room for a dozen
NUM_ABSENT = 200
CACHED_CLIENTS, ABSENT_CLIENTS = 4, 2
THINK_S, ABSENT_THINK_S = 0.02, 0.5
DEADLINE_S = 20.0  # of a fetch, so that each trouble is met by several
SLOWEST_S = 60.0  # that any answer may take

_PAGE = b"<html><body>We are making the Hub better for you. Come back soon.</body></html>"
TROUBLES: dict[str, Callable[[FakeHub], None]] = {
    "refused": lambda hub: hub.close_door(),
    "503": lambda hub: hub.fail_everywhere(Fault(503)),
    "trickle": lambda hub: hub.fail_everywhere(Fault(pace=(1, 9.0))),
    "reset": lambda hub: hub.fail_everywhere(Fault(reset="before")),
    "html": lambda hub: hub.fail_everywhere(Fault(body=_PAGE)),
    "silent": lambda hub: hub.fail_everywhere(Fault(silent_s=3600.0)),
}


@dataclass
class Answers:
    """What callers got in one phase."""

    durations_s: list[float] = field(default_factory=list)
    statuses: Counter[int] = field(default_factory=Counter)  # 0: none at all
    tiers: Counter[str] = field(default_factory=Counter)
    num_unretriable: int = 0  # 503 without Retry-After

    def quantile_ms(self, share: float) -> float | None:
        ordered = sorted(self.durations_s)
        return round(1000 * ordered[math.ceil(share * len(ordered)) - 1], 1) if ordered else None

    @property
    def num_errors(self) -> int:
        return self.statuses.total() - self.statuses[200]


@contextmanager
def service_over(hub: FakeHub, data: Path, **variables: str) -> Iterator[LiveService]:
    """A live service whose Hub is `hub`, until the block ends."""
    settings = {"ROOKERY_HUB_ENABLED": "true", "ROOKERY_HUB_ENDPOINT": hub.endpoint, "ROOKERY_HUB_TOKEN": "hf_secret"}
    service = start_service(data, **settings | variables)
    try:
        yield service
    finally:
        stop_service(service)


def outage(minutes: float, folder: Path, say: Callable[[str], None] = lambda _: None) -> dict[str, Any]:
    """The figures of so many minutes of trouble, `outage_errors` first. `folder`: an empty one to work in."""
    with fake_hub() as hub:
        cached = [f"huggingtweets/here-{i}" for i in range(NUM_CACHED)]
        for i, model in enumerate(cached):
            hub.add(model, write_tiny_gpt2(folder / f"here-{i}", seed=i, n_embd=192))
        absent = [f"huggingtweets/away-{i}" for i in range(NUM_ABSENT)]
        for model in absent:
            hub.add(model, folder / "here-0")
        import_tiny_model(folder / "data", BASE)
        with service_over(hub, folder / "data", ROOKERY_HUB_DEADLINE_S=str(DEADLINE_S)) as service:
            return asyncio.run(_Outage(hub, service.url, cached, absent, say).run(60 * minutes))


class _Outage:
    def __init__(
        self, hub: FakeHub, url: str, cached: list[str], absent: list[str], say: Callable[[str], None]
    ) -> None:
        self._hub, self._cached, self._absent, self._say = hub, cached, absent, say
        self._client = httpx.AsyncClient(base_url=url, timeout=SLOWEST_S)
        self._random = random.Random(5)
        self._weights = [1 / (rank + 1) for rank in range(len(cached))]  # Zipf

    async def run(self, duration_s: float) -> dict[str, Any]:
        async with self._client:
            fetched, before, during, away = Answers(), Answers(), Answers(), Answers()
            for model in self._cached:
                await self._ask(model, fetched)
            assert fetched.num_errors == 0, f"the models could not be fetched: {fetched.statuses}"
            await self._ask_for_cached(max(5.0, duration_s / 10), before)
            num_before = len(self._hub.requests)
            met: dict[str, int] = {}  # of the Hub, by what was wrong with it; it sees nothing of what it refuses
            until = time.monotonic() + duration_s
            strangers = asyncio.gather(*(self._ask_for_absent(until, away) for _ in range(ABSENT_CLIENTS)))
            for trouble, begin in TROUBLES.items():
                self._recover()
                begin(self._hub)
                errors, answers, requests = during.num_errors, away.statuses.total(), len(self._hub.requests)
                await self._ask_for_cached(duration_s / len(TROUBLES), during)
                met[trouble] = len(self._hub.requests) - requests
                self._say(
                    f"{trouble}: {during.num_errors - errors} errors on cached models, "
                    f"{away.statuses.total() - answers} answers about absent ones"
                )
            await strangers
            asked = [seen.path for seen in self._hub.requests[num_before:]]
            self._recover()
            figures = self._figures(before, during, away, asked)
            return figures | {"outage_hub_requests": met, "outage_recovery_s": await self._come_back()}

    def _recover(self) -> None:
        self._hub.recover()
        self._hub.open_door()

    async def _ask_for_cached(self, duration_s: float, answers: Answers) -> None:
        until = time.monotonic() + duration_s

        async def go_on() -> None:
            while time.monotonic() < until:
                await self._ask(self._random.choices(self._cached, self._weights)[0], answers)
                await asyncio.sleep(THINK_S * self._random.uniform(0.5, 1.5))

        await asyncio.gather(*(go_on() for _ in range(CACHED_CLIENTS)))

    async def _ask_for_absent(self, until: float, answers: Answers) -> None:
        while time.monotonic() < until:
            await self._ask(self._random.choice(self._absent), answers)
            await asyncio.sleep(ABSENT_THINK_S * self._random.uniform(0.5, 1.5))

    async def _ask(self, model: str, answers: Answers) -> httpx.Response | None:
        body = {"model": model, "prompt": "My dream is", "max_tokens": 8}
        started = time.monotonic()
        try:
            reply = await self._client.post("/v1/completions", json=body)
        except httpx.HTTPError:
            reply = None
        answers.durations_s.append(time.monotonic() - started)
        answers.statuses[reply.status_code if reply else 0] += 1
        if reply is not None:
            answers.tiers[reply.headers.get("x-model-tier", "")] += 1
            answers.num_unretriable += reply.status_code == 503 and "retry-after" not in reply.headers
        return reply

    async def _come_back(self) -> float | None:
        """How long after the trouble an absent model comes, asked for as `Retry-After` says."""
        started = time.monotonic()
        while time.monotonic() - started < 150:
            reply = await self._ask(self._absent[0], Answers())
            if reply is not None and reply.status_code == 200:
                return round(time.monotonic() - started, 1)
            await asyncio.sleep(min(5.0, float(reply.headers.get("retry-after", 1))) if reply else 1.0)
        return None

    def _figures(self, before: Answers, during: Answers, away: Answers, asked: list[str]) -> dict[str, Any]:
        about_cached = [path for path in asked if any(f"/{model}/" in f"{path}/" for model in self._cached)]
        return {
            "outage_errors": during.num_errors,
            "outage_requests": during.statuses.total(),
            "outage_hub_requests_cached": len(about_cached),
            "outage_hub_requests_absent": len(asked) - len(about_cached),
            "outage_p50_ms": [before.quantile_ms(0.5), during.quantile_ms(0.5)],  # before, during
            "outage_p99_ms": [before.quantile_ms(0.99), during.quantile_ms(0.99)],
            "outage_from_disk": during.statuses.total() - during.tiers["device"],
            "outage_absent_statuses": {str(status): count for status, count in sorted(away.statuses.items())},
            "outage_absent_without_retry_after": away.num_unretriable,
            "outage_absent_p50_ms": away.quantile_ms(0.5),
            "outage_absent_mean_ms": round(1000 * statistics.fmean(away.durations_s), 1) if away.durations_s else None,
            "outage_absent_max_ms": away.quantile_ms(1.0),
        }
