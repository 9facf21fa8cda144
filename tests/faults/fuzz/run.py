"""Many cases at a service, a few at once, and the count of what was wrong with its answers."""

from __future__ import annotations

import asyncio
import gc
import math
import random
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from tests.faults.fuzz import http_level, requests
from tests.faults.fuzz.case import Case
from tests.faults.fuzz.exchange import Outcome, exchange
from tests.faults.fuzz.probe import Probe, quantile
from tests.faults.fuzz.surface import Surface, read_surface
from tests.faults.fuzz.verdict import faults_of

MAX_REFUSAL_S = 0.1  # beyond what GET /healthz takes at the time
NUM_AT_ONCE = 12
_NUM_LORIS_AT_ONCE = 40
_KEPT_OF_EACH = 3

# How many of a hundred. What comes byte by byte is slow, and goes beside the others.
FAMILIES: Mapping[str, tuple[Callable[[random.Random, Surface], Case], int]] = {
    "B1": (requests.b1_ids, 20),
    "B2": (requests.b2_json, 16),
    "B3": (requests.b3_sizes, 8),
    "B4": (requests.b4_types, 12),
    "B5": (requests.b5_parameters, 12),
    "B6": (requests.b6_prompts, 8),
    "B11": (requests.b11_names, 6),
    "B13": (requests.b13_keys, 6),
    "B14": (http_level.b14_http, 12),
}
_LORIS_SHARE = 0.001


def case_of(number: int, seed: int, surface: Surface, families: tuple[str, ...] = tuple(FAMILIES)) -> Case:
    """Case `number` of a run; the same for the same seed."""
    rng = random.Random(f"{seed}:{number}")
    family = rng.choices(families, [FAMILIES[name][1] for name in families])[0]
    return FAMILIES[family][0](rng, surface)


def corpus() -> list[Case]:
    """Requests that once were answered wrongly: files of raw bytes, whose names begin with their family."""
    files = sorted((Path(__file__).parent / "corpus").glob("*.http"))
    return [Case(path.name.partition("-")[0].upper(), (path.read_bytes(),)) for path in files]


@dataclass
class Tally:
    """What has come of the cases so far; of each fault some are kept as files in `folder`."""

    folder: Path
    wrong: Counter[str] = field(default_factory=Counter)
    by_status: Counter[str] = field(default_factory=Counter)
    by_family: dict[str, Counter[str]] = field(default_factory=dict)
    refused_s: list[float] = field(default_factory=list)
    max_bytes: int = 0
    kept: Counter[str] = field(default_factory=Counter)

    def add(self, number: int, case: Case, outcome: Outcome, baseline_s: float) -> None:
        """Counts what is wrong with it, each kind once a case."""
        found = {fault for answer in outcome.answers for fault in faults_of(case, answer)}
        if outcome.hangs:
            found.add("hangs")
        if outcome.is_garbage:
            found.add("garbage")
        refusals = [one for one in outcome.answers if one.status >= 400]
        if refusals and case.family != "loris":
            self.refused_s.append(outcome.took_s)
            if outcome.took_s > MAX_REFUSAL_S + baseline_s:
                found.add("slow")
        self.max_bytes = max([self.max_bytes, *(len(one.body) for one in refusals if not _is_page(one.headers))])
        self.wrong.update(found)
        family = self.by_family.setdefault(case.family, Counter())
        family.update(["cases", *found])
        statuses = [str(one.status) for one in outcome.answers] or ["none"]
        self.by_status.update(statuses)
        family.update(statuses)
        for fault in found:
            self._keep(fault, number, case, outcome)

    def _keep(self, fault: str, number: int, case: Case, outcome: Outcome) -> None:
        kind = f"{fault}-{case.family}"
        self.kept[kind] += 1
        if self.kept[kind] <= _KEPT_OF_EACH:
            stem = self.folder / f"{kind}-{number}"
            stem.with_suffix(".http").write_bytes(b"".join(case.pieces))
            told = b"\n\n".join(b"%d %r\n%s" % (one.status, one.headers, one.body) for one in outcome.answers)
            stem.with_suffix(".answer").write_bytes(b"%.3f s\n" % outcome.took_s + told)


def _is_page(headers: tuple[tuple[bytes, bytes], ...]) -> bool:
    return any(name == b"content-type" and value.startswith(b"text/html") for name, value in headers)


async def fuzz(
    url: str,
    num_cases: int,
    seed: int,
    folder: Path,
    *,
    families: tuple[str, ...] = tuple(FAMILIES),
    with_loris: bool = True,
    say: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Sends the corpus and the cases to the service at `url`; gives the figures. Kept cases go to `folder`."""
    surface = await asyncio.to_thread(read_surface, url)
    place = urlsplit(url)
    assert place.hostname and place.port
    host, port = place.hostname, place.port
    tally, probe, started = Tally(folder), Probe(host, port), time.monotonic()
    numbers = iter(range(num_cases))
    num_loris = int(num_cases * _LORIS_SHARE) if with_loris else 0

    async def send(number: int, case: Case) -> None:
        outcome = await exchange(host, port, case)
        tally.add(number, case, outcome, probe.baseline_s)

    async def work(left: Iterator[int]) -> None:
        for number in left:
            await send(number, case_of(number, seed, surface, families))
            if number and number % 5_000 == 0:
                say(f"{number} cases, {time.monotonic() - started:.0f} s, {dict(tally.wrong)}")

    async def dawdle(left: Iterator[int]) -> None:
        for number in left:
            await send(number, http_level.loris(random.Random(f"{seed}:{number}"), surface))

    known = corpus()
    gc.collect()
    gc.freeze()  # what is here already, torch among it, is not to be looked through while an answer is waited for
    probing = asyncio.create_task(probe.run())
    slow = iter(range(num_cases, num_cases + num_loris))
    try:
        for number, case in enumerate(known):
            await send(-1 - number, case)
        async with asyncio.TaskGroup() as group:
            for _ in range(NUM_AT_ONCE):
                group.create_task(work(numbers))
            for _ in range(min(_NUM_LORIS_AT_ONCE, num_loris)):
                group.create_task(dawdle(slow))
    finally:
        probing.cancel()
        with suppress(asyncio.CancelledError):
            await probing
    return {
        "cases": len(known) + num_cases + num_loris,
        "status_5xx": tally.wrong["status_5xx"],
        "hangs": tally.wrong["hangs"],
        "echoes": tally.wrong["echo"],
        "slow": tally.wrong["slow"],
        "large": tally.wrong["large"],
        "misshapen": tally.wrong["misshapen"],
        "garbage": tally.wrong["garbage"],
        "cut": tally.wrong["cut"],
        "crossed": probe.num_crossed,
        "max_bytes": tally.max_bytes,
        "refused_ms": _spread_ms(tally.refused_s),
        "healthz_ms": _spread_ms(probe.all_s),
        "seed": seed,
        "seconds": round(time.monotonic() - started, 1),
        "by_status": dict(sorted(tally.by_status.items())),
        "by_family": {name: dict(sorted(counts.items())) for name, counts in sorted(tally.by_family.items())},
    }


async def send_all(url: str, cases: Iterable[Case], tally: Tally, *, at_once: int) -> None:
    """Sends cases that were made before; how long they take is not judged."""
    place, left = urlsplit(url), iter(enumerate(cases))
    host, port = place.hostname or "", place.port or 80

    async def work() -> None:
        for number, case in left:
            tally.add(number, case, await exchange(host, port, case), baseline_s=math.inf)

    async with asyncio.TaskGroup() as group:
        for _ in range(at_once):
            group.create_task(work())


def _spread_ms(values: list[float]) -> dict[str, float]:
    return {name: round(1000 * quantile(values, share), 1) for name, share in (("p50", 0.5), ("p99", 0.99), ("max", 1))}
