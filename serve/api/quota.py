"""How much a caller may ask for: requests a second, tokens a minute, generations at once, bytes kept.

What a request may cost at most is taken before its work begins, and put right by what it has cost. A key without
limits of its own has the server's; callers without a key have theirs by address. 0: there is none.
Each gateway counts for itself, so that a key may have as much of each as there are; with ROOKERY_LIMITS_URL all count
requests and tokens together.
"""

from __future__ import annotations

import asyncio
import math
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from ipaddress import IPv6Address, ip_address, ip_network
from typing import TypeVar

from fastapi import Request
from starlette.requests import ClientDisconnect

from serve.api.access import Caller
from serve.api.rates import Count, Rates
from serve.errors import DeadlineExceeded, InvalidRequest, QuotaExceeded, RateLimited
from serve.metrics import Metrics
from serve.settings import Settings
from serve.types import GenerationRequest, KeyLimits, SamplingParams

N = TypeVar("N", int, float)

NO_LIMITS = KeyLimits()
_CHARS_PER_TOKEN = 4  # of English, about
_BUSY_S = 1.0
_NETWORK_BITS = 64  # of IPv6: so much one household has


class Quota:
    """`of_keys`: for keys that have no limit of their own; `of_strangers`: for each address without a key."""

    def __init__(
        self,
        of_keys: KeyLimits = NO_LIMITS,
        of_strangers: KeyLimits = NO_LIMITS,
        *,
        rates: Rates | None = None,
        address_header: str = "",
        metrics: Metrics | None = None,
    ) -> None:
        self._of_keys, self._of_strangers = of_keys, of_strangers
        self._rates = rates or Rates()
        self._address_header = address_header
        self._in_flight: Counter[str] = Counter()
        self._metrics = metrics or Metrics(enabled=False)

    async def close(self) -> None:
        await self._rates.close()

    @classmethod
    def from_settings(cls, settings: Settings, metrics: Metrics) -> Quota:
        """Raises: BadSetting."""
        return cls(
            KeyLimits(
                settings.requests_per_s,
                settings.tokens_per_min,
                settings.in_flight,
                settings.max_jobs_per_key,
                settings.storage_bytes,
            ),
            KeyLimits(
                settings.anonymous_requests_per_s,
                settings.anonymous_tokens_per_min,
                settings.anonymous_in_flight,
            ),
            rates=Rates(settings.limits_url),
            address_header=settings.address_header,
            metrics=metrics,
        )

    def allowance(self, caller: Caller, request: Request) -> Allowance:
        """What this request may have."""
        if caller.key is None:
            return Allowance(self, f"address:{self._address_of(request)}", self._of_strangers)
        own, usual = caller.key.limits, self._of_keys
        limits = KeyLimits(
            requests_per_s=_first(own.requests_per_s, usual.requests_per_s),
            tokens_per_min=_first(own.tokens_per_min, usual.tokens_per_min),
            in_flight=_first(own.in_flight, usual.in_flight),
            jobs=_first(own.jobs, usual.jobs),
            storage_bytes=_first(own.storage_bytes, usual.storage_bytes),
        )
        return Allowance(self, caller.key.id, limits)

    async def take_request(self, allowance: Allowance) -> None:
        """Raises: RateLimited."""
        if per_s := allowance.limits.requests_per_s:
            count = allowance.counts["requests"] = await self._rates.request(allowance.who, per_s)
            self._check("requests", count, f"{per_s:g} requests a second")

    async def take_tokens(self, allowance: Allowance, cost: int) -> Count | None:
        """None: nothing was taken. Raises: RateLimited; InvalidRequest where it is more than a minute's."""
        if not (per_min := allowance.limits.tokens_per_min):
            return None
        if cost > per_min:
            raise InvalidRequest(
                f"This request asks for up to {cost} tokens, the prompt's among them, and {per_min} a minute is the "
                "limit here: ask for fewer.",
                param="max_tokens",
            )
        count = allowance.counts["tokens"] = await self._rates.tokens(allowance.who, per_min, cost)
        self._check("tokens", count, f"{per_min} tokens a minute, of prompts and texts together,")
        return count

    async def correct_tokens(self, allowance: Allowance, more: int, taken: Count | None) -> None:
        """Charges `more` than was `taken`; whether or not there is room for it, as it is spent."""
        minute = taken.minute if taken else 0
        if (per_min := allowance.limits.tokens_per_min) and more:
            allowance.counts["tokens"] = await self._rates.correct(allowance.who, per_min, more, minute)

    @asynccontextmanager
    async def place(self, allowance: Allowance) -> AsyncIterator[None]:
        """One of the generations that may run at once. Raises: RateLimited."""
        most = allowance.limits.in_flight
        if most and self._in_flight[allowance.who] >= most:
            busy = Count(most, 0, _BUSY_S, wait_s=_BUSY_S)
            self._check("in_flight", busy, f"{most} generation{'s' * (most > 1)} at once")
        self._in_flight[allowance.who] += 1
        try:
            yield
        finally:
            self._in_flight[allowance.who] -= 1
            if not self._in_flight[allowance.who]:
                del self._in_flight[allowance.who]

    def _check(self, what: str, count: Count | None, limit: str) -> None:
        if count is not None and count.wait_s > 0:
            self._metrics.rate_limited.labels(what).inc()
            raise RateLimited(
                f"{limit[0].upper()}{limit[1:]} is the limit here, and you have had it: try again in "
                f"{math.ceil(count.wait_s)} s.",
                retry_after_s=count.wait_s,
            )

    def _address_of(self, request: Request) -> str:
        """The client's, or its household's; behind a proxy that says whom it asks for, what that wrote last."""
        said = request.headers.getlist(self._address_header) if self._address_header else []  # a line of each proxy
        text = "".join(said[-1:]).rpartition(",")[2].strip() or (request.client.host if request.client else "")
        try:
            address = ip_address(text)
        except ValueError:
            return ""
        is_v6 = isinstance(address, IPv6Address) and address.ipv4_mapped is None
        return str(ip_network((address, _NETWORK_BITS), strict=False)) if is_v6 else text


@dataclass(slots=True)
class Allowance:
    """What one request may have, and what its limits have come to."""

    quota: Quota
    who: str
    limits: KeyLimits
    counts: dict[str, Count | None] = field(default_factory=dict)  # by what was counted; None: it could not be

    @asynccontextmanager
    async def generating(self, request: GenerationRequest, num_spent: Callable[[], int]) -> AsyncIterator[None]:
        """The block in which it is generated; `num_spent` tokens it has really cost.

        Raises: RateLimited, InvalidRequest.
        """
        cost, least = max_cost(request), 0
        async with self.quota.place(self):
            taken = await self.quota.take_tokens(self, cost)
            try:
                yield
            except (ClientDisconnect, DeadlineExceeded, asyncio.CancelledError):
                # A generator tells of a whole answer's beginning and end alone: how far it has come nobody here knows.
                least = cost if request.is_whole and num_spent() else 0
                raise
            finally:
                await self.quota.correct_tokens(self, max(least, num_spent()) - (cost if taken else 0), taken)

    def check_storage(self, num_bytes: int, fresh: int) -> None:
        """Whether there is room for `fresh` bytes more beside `num_bytes`. Raises: QuotaExceeded."""
        most = self.limits.storage_bytes
        if most and num_bytes + fresh > most:
            raise QuotaExceeded(
                f"Your files and models take {num_bytes / 1e6:.1f} MB, {fresh / 1e6:.1f} MB are to come, and "
                f"{most / 1e6:.1f} MB is the limit: delete what you do not need."
            )

    def headers(self) -> Mapping[str, str]:
        """OpenAI's, of what is limited."""
        told: dict[str, str] = {}
        for what, count in self.counts.items():
            if count is not None:
                told[f"x-ratelimit-limit-{what}"] = str(count.limit)
                told[f"x-ratelimit-remaining-{what}"] = str(count.remaining)
                told[f"x-ratelimit-reset-{what}"] = as_duration(count.reset_s)
        return told


def allowance(request: Request) -> Allowance:
    """What this request may have, as the border of the API has found."""
    found: Allowance = request.state.allowance
    return found


def max_cost(request: GenerationRequest) -> int:
    """Tokens, of prompts (guessed) and of texts as long as they may become: also where nobody said how long."""
    asked = request.sampling.get("max_new_tokens", SamplingParams().max_new_tokens)
    prompts = [len(prompt) if isinstance(prompt, tuple) else _guess_tokens(prompt) for prompt in request.prompts]
    return sum(prompts) + len(prompts) * request.num_choices * asked


def _guess_tokens(prompt: str) -> int:
    """Before anything reads it: a GPT-2 has hardly a token of several letters that ASCII has not."""
    return math.ceil(len(prompt) / _CHARS_PER_TOKEN) + len(prompt.encode()) - len(prompt)


def as_duration(seconds: float) -> str:
    """ "1s", "6m0s": whole seconds, no fewer than there are."""
    minutes, rest = divmod(math.ceil(seconds), 60)
    return f"{minutes}m{rest}s" if minutes else f"{rest}s"


def _first(own: N | None, usual: N | None) -> N | None:
    return usual if own is None else own
