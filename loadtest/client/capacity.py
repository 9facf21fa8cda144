"""What a server can do of a plan's mix, in requests a second: clients that ask again as soon as they have an answer."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import aiohttp

from loadtest.client.sender import Sender, open_session
from loadtest.client.target import Target
from loadtest.results.record import Record
from loadtest.traffic.changing import override
from loadtest.traffic.plan import Call, Plan
from loadtest.traffic.schedule import schedule

_CLIENTS = 32
_MOST_CLIENTS = 1024
_GROWTH = 1.05  # of the answers a second, for which twice the clients are worth a try
_PAUSE_S = 0.05  # after a refusal


@dataclass(frozen=True, slots=True)
class Capacity:
    """Answers a second, and how many clients got them."""

    rps: float
    clients: int


async def measure_capacity(
    plan: Plan,
    target: Target,
    *,
    models: Sequence[str],
    probe_s: float = 5.0,
    warmup_s: float = 2.0,
    clients: int = _CLIENTS,
    most_clients: int = _MOST_CLIENTS,
) -> Capacity:
    """The most of `clients`, twice as many, and so on until they get no more; each for `warmup_s` + `probe_s` seconds.

    The calls are those of the resolved `plan`, in its order whatever its rates, so flows, models and lengths are mixed
    as there. Raises: BadPlan
    """
    calls = itertools.chain(schedule(plan, models), _further(plan, models))
    best = Capacity(0.0, clients)
    async with open_session(target) as session:
        while True:
            rps = await _answers_a_second(_Loop(plan, target, session, calls), clients, warmup_s, probe_s)
            grows = rps > _GROWTH * best.rps
            best = max(best, Capacity(rps, clients), key=lambda each: each.rps)
            clients *= 2
            if not grows or clients > most_clients:
                return best


@dataclass(frozen=True, slots=True)
class _Loop:
    """What clients of a closed loop send."""

    plan: Plan
    target: Target
    session: aiohttp.ClientSession
    calls: Iterator[Call]


async def _answers_a_second(loop: _Loop, clients: int, warmup_s: float, probe_s: float) -> float:
    ended: list[Record] = []
    started = time.perf_counter()

    def clock() -> float:
        return time.perf_counter() - started

    sender = Sender(loop.session, loop.target, loop.plan.flows, loop.plan.timeout_s, clock)

    async def ask_again() -> None:
        while (now_s := clock()) < warmup_s + probe_s:
            record = await sender.send(replace(next(loop.calls), at_s=now_s))
            ended.append(record)
            if not _is_answered(record):
                await asyncio.sleep(_PAUSE_S)

    async with asyncio.TaskGroup() as group:
        for _ in range(clients):
            group.create_task(ask_again())
    in_time = [record for record in ended if warmup_s <= record.ended_s < warmup_s + probe_s]
    return sum(map(_is_answered, in_time)) / probe_s


def _is_answered(record: Record) -> bool:
    """Whoever hangs up before anything came may have been in a queue all the time."""
    return record.outcome == "ok" or (record.outcome == "cancelled" and record.first_s is not None)


def _further(plan: Plan, models: Sequence[str]) -> Iterator[Call]:
    """Calls without end, for a server that is through with those of the plan."""
    for lap in itertools.count(1):
        yield from schedule(override(plan, seed=plan.seed + lap), models)
