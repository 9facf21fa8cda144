"""B7 to B9: archives, texts and weights made to do harm."""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil  # type: ignore[import-untyped]

from tests.deployments.conftest import LiveService
from tests.faults import mutate_weights
from tests.faults.fuzz.__main__ import service_to_fuzz
from tests.faults.fuzz.archives import archive_case, b7_damaged, b8_text, made_to_harm
from tests.faults.fuzz.case import Case
from tests.faults.fuzz.run import Tally, send_all
from tests.faults.row import Measured, row

_WRONG = ("status_5xx", "hangs", "echo", "large", "misshapen", "garbage", "cut")
MAX_GROWTH_BYTES = 400 << 20  # of gateways that read two archives at once


@row(
    "B7",
    did="20 kinds of archive made to do harm, and 4,000 real ones damaged, uploaded to be looked at",
    expected="read or refused; 0 5xx, 0 hangs; no gateway grows by more than 400 MB",
    minutes=5,
)
def hostile_archives(folder: Path, share: float) -> Measured:
    rng = random.Random(1)
    made = [archive_case("B7", make()) for make in made_to_harm().values()]
    damaged = [b7_damaged(rng) for _ in range(max(40, round(4_000 * share)))]
    return _uploaded([*made, *damaged], folder)


@row(
    "B8",
    did="2,000 archives of posts in other encodings, with marks, controls, huge numbers and wrong dates",
    expected="read or refused; 0 5xx, 0 hangs; no gateway grows by more than 400 MB",
    minutes=3,
)
def hostile_text(folder: Path, share: float) -> Measured:
    rng = random.Random(1)
    return _uploaded([b8_text(rng) for _ in range(max(40, round(2_000 * share)))], folder)


def _uploaded(cases: list[Case], folder: Path) -> Measured:
    tally = Tally(folder)
    with service_to_fuzz(folder) as service, _growth_of_gateways(service) as growth:
        asyncio.run(send_all(service.url, cases, tally, at_once=4))
    num_refused = len(tally.refused_s)
    wrong = {name: tally.wrong[name] for name in _WRONG}
    figure = (
        f"{len(cases):,} archives: {tally.by_status['200']} read, {num_refused} refused, "
        f"{wrong['status_5xx']} 5xx, {wrong['hangs']} hangs; {max(growth) >> 20} MB more at most, "
        f"refused within {1000 * max(tally.refused_s, default=0):.0f} ms"
    )
    holds = not any(wrong.values()) and num_refused > 0 and max(growth) < MAX_GROWTH_BYTES
    return Measured(figure, holds, {**wrong, "by_status": dict(tally.by_status)})


@contextmanager
def _growth_of_gateways(service: LiveService) -> Iterator[list[int]]:
    """How many bytes more than at first they have held, looked at all the while."""
    processes = [psutil.Process(pid) for pid in service.replica_pids("gateway")]
    assert processes
    before, growth, over = sum(one.memory_info().rss for one in processes), [0], threading.Event()

    def watch() -> None:
        while not over.wait(0.05):
            growth.append(sum(one.memory_info().rss for one in processes) - before)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield growth
    finally:
        over.set()
        watcher.join()


@row(
    "B9",
    did="2,000 model folders mutated, pickles that act among them, imported, loaded and read by others",
    expected="0 crashes, 0 wrong loads, 0 pickles run",
    minutes=6,
)
def hostile_weights(folder: Path, share: float) -> Measured:
    figures = mutate_weights.run(max(20, round(2_000 * share)), seed=9)
    failures = figures.pop("failures")
    figure = (
        f"{figures['mutations']:,} mutations: {figures['refused']:,} refused, {figures['loaded']:,} harmless; "
        f"{figures['crashes']} crashes, {figures['wrong_loads']} wrong loads, {figures['pickle_ran']} pickles run"
    )
    holds = not any(figures[name] for name in ("crashes", "wrong_loads", "pickle_ran")) and figures["refused"] > 0
    return Measured(figure, holds, {**figures, "failures": failures[:5]})
