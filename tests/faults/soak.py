"""A service in ordinary use for a long time: does it need more and more?

    python -m tests.faults.soak --minutes 30        # ends with one JSON line

First each place that a generator has writes a text as long as the context, for what is laid out then takes memory. Then
more models than fit, favourites that change, readers who hang up, models that are made and deleted, and training. Every
ten seconds memory, open files and threads of all processes that are there from the beginning to the end are added up.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import math
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil  # type: ignore[import-untyped]

from tests.faults.live import MODELS, Flock, flock
from tests.faults.rows.model import ask_status, publish

NUM_BLOCKS = 12
_T = 2.228  # of Student's distribution: 95 % with `NUM_BLOCKS` - 2 degrees of freedom
_MIN_SLOPE = 1.0  # MB/h: less is no leak
_MOST_MORE = 2  # open files or threads
_WARM_SHARE = 0.25  # of the time, before anything is compared; a day is as long: what is compared are three whole ones
_SETTLES_S = 5.0
# Ray closes a connection that nobody used for half an hour, some 45 of the first minute at once: here in the warm-up.
_IDLE_MS = "60000"
_NUM_LONG = 64  # texts at once, more than two generators have places for
_NUM_MODELS = 24
_PLAN = """
about = "Days of a few minutes, changing favourites among twice as many models as fit, hang-ups, training."
duration_s = {duration_s}
warmup_s = 5
timeout_s = 60

[arrivals]
process = "diurnal"
period_s = {period_s}
trough = 0.2
rate = 4

[models]
count = {count}
popularity = "churning"
churn_s = 60
favourites = 8

[requests]
streaming = 0.8
choices = {{ 1 = 0.9, 4 = 0.1 }}
output_tokens = [8, 40]
cancelled = 0.1

[training]
jobs = {jobs}
every_s = 300
epochs = 1
posts = 60
"""


@dataclass(frozen=True, slots=True)
class Sample:
    """One process at one moment."""

    kind: str
    at_s: float
    rss_mb: float
    fds: int
    threads: int


@dataclass(frozen=True, slots=True)
class Moment:
    """All processes, and what of their memory are weights: as many models as asked for and as the budget allows."""

    samples: dict[psutil.Process, Sample]
    weights_mb: float


@dataclass(frozen=True, slots=True)
class Soaked:
    """What came of it. After the warm-up time is cut into twelve parts.

    Memory: without the weights, the medians of the parts and the line through them. Open files and threads: the least
    of the last part less the least of the first, for connections come and go.
    """

    minutes: float
    requests: int
    errors: int
    refused: int
    jobs_done: int
    churned: int
    processes: int
    samples: int
    rss_mb: float
    parts_mb: list[float]  # of each part, without the weights
    mb_per_hour: float
    mb_per_hour_interval: float  # 95 %, to either side: a smaller leak cannot be told from noise
    fds: int
    threads: int
    grown_mb: dict[str, float]  # by kind of process, from the first part to the last

    @property
    def is_flat(self) -> bool:
        no_slope = self.mb_per_hour - self.mb_per_hour_interval <= _MIN_SLOPE
        return no_slope and abs(self.fds) <= _MOST_MORE and abs(self.threads) <= _MOST_MORE

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "flat": self.is_flat}


def soak(folder: Path, minutes: float) -> Soaked:
    """Starts a service of two generators, two gateways and a trainer in `folder`, and leaves nothing running."""
    duration_s = 60 * minutes
    models = [*MODELS, *(f"flock/many{number}" for number in range(_NUM_MODELS - len(MODELS)))]
    plan = folder / "soak.toml"
    jobs = max(1, int(duration_s // 300))
    plan.write_text(
        _PLAN.format(duration_s=duration_s, period_s=max(60, _WARM_SHARE * duration_s), count=len(models), jobs=jobs)
    )
    with flock(
        folder / "data", ROOKERY_MEMORY_BYTES=str(126_000_000), RAY_grpc_client_idle_timeout_ms=_IDLE_MS
    ) as live:
        for number, model in enumerate(models[len(MODELS) :]):
            publish(live, model, seed=100 + number)
        asyncio.run(fill(live, MODELS, context=256))
        asyncio.run(fill(live, models[len(MODELS) :], context=512))
        command = [sys.executable, "-m", "loadtest", "run", str(plan), "--url", live.url, "--json"]
        load = subprocess.Popen([*command, "--models", ",".join(models)], stdout=subprocess.PIPE, text=True)
        try:
            with churn(live) as made:
                samples = watch(live, duration_s)
            said, _ = load.communicate(timeout=180)
        finally:
            load.kill()
            load.wait()
    figures = json.loads(said.splitlines()[-1])
    return judge(samples, minutes, figures, len(made))


async def fill(live: Flock, models: Sequence[str], *, context: int) -> None:
    """All places of all generators for models of one layout, each with a text of `context` tokens.

    Keys and values take memory when they are first written: in ordinary use they go on doing so for hours, as now and
    then more texts than ever are written at once, or a longer one.
    """
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=live.url, timeout=600, limits=limits) as client, asyncio.TaskGroup() as group:
        for number, model in zip(range(_NUM_LONG), itertools.cycle(models), strict=False):
            length = {"max_tokens": context - 1, "min_tokens": context - 1}
            asked = client.post("/v1/completions", json={"model": model, "prompt": "I", "seed": number, **length})
            group.create_task(asked)


@contextmanager
def churn(live: Flock) -> Iterator[list[str]]:
    """Every few seconds a model is published, asked, and deleted; those that were."""
    made: list[str] = []
    failed: list[BaseException] = []
    is_over = threading.Event()

    def work() -> None:
        try:
            for number in itertools.count():
                model = f"flock/passing{number % 7}"
                publish(live, model, seed=1000 + number)
                ask_status(live, model)
                httpx.delete(f"{live.url}/v1/models/{model}", timeout=60)
                made.append(model)
                if is_over.wait(5.0):
                    return
        except Exception as exc:
            failed.append(exc)

    thread = threading.Thread(target=work, name="churn")
    thread.start()
    try:
        yield made
    finally:
        is_over.set()
        thread.join()
    if failed:
        raise failed[0]


def watch(live: Flock, duration_s: float) -> list[Moment]:
    """All processes of the service, again and again."""
    service = psutil.Process(live.service.process.pid)
    began, found = time.monotonic(), list[Moment]()
    every_s = min(10.0, duration_s / 60)
    while (now := time.monotonic() - began) < duration_s:
        weights_mb = _weights_mb(live)
        samples: dict[psutil.Process, Sample] = {}
        for process in (service, *service.children(recursive=True)):
            with suppress(psutil.Error), process.oneshot():
                rss_mb = process.memory_info().rss / 1e6
                kind = kind_of(process.cmdline())
                samples[process] = Sample(kind, now, rss_mb, process.num_fds(), process.num_threads())
        found.append(Moment(samples, weights_mb))
        time.sleep(max(0.0, every_s - (time.monotonic() - began - now)))
    return found


def judge(moments: Sequence[Moment], minutes: float, figures: dict[str, Any], churned: int) -> Soaked:
    """Of the processes that were there at each moment after the warm-up."""
    measured = moments[int(_WARM_SHARE * len(moments)) :]
    steady = sorted(set.intersection(*(set(moment.samples) for moment in measured)), key=lambda process: process.pid)
    size = len(measured) // NUM_BLOCKS
    blocks = [measured[size * number : size * (number + 1)] for number in range(NUM_BLOCKS)]

    def mb(moment: Moment, processes: Sequence[psutil.Process]) -> float:
        return sum(moment.samples[process].rss_mb for process in processes)

    def median_mb(block: Sequence[Moment], processes: Sequence[psutil.Process]) -> float:
        return statistics.median(mb(moment, processes) for moment in block)

    def median_rest_mb(block: Sequence[Moment]) -> float:
        return statistics.median(mb(moment, steady) - moment.weights_mb for moment in block)

    def least(block: Sequence[Moment], what: str) -> int:
        numbers: list[int] = [sum(getattr(moment.samples[process], what) for process in steady) for moment in block]
        return min(numbers)

    times_h = [statistics.mean(moment.samples[steady[0]].at_s for moment in block) / 3600 for block in blocks]
    slope, interval = line(times_h, [median_rest_mb(block) for block in blocks])
    kinds: dict[str, list[psutil.Process]] = {}
    for process in steady:
        kinds.setdefault(measured[0].samples[process].kind, []).append(process)
    grown = {kind: median_mb(blocks[-1], those) - median_mb(blocks[0], those) for kind, those in kinds.items()}
    return Soaked(
        minutes=minutes,
        requests=figures["requests"],
        errors=figures["errors"],
        refused=figures["refused"],
        jobs_done=figures["jobs_done"],
        churned=churned,
        processes=len(steady),
        samples=len(measured),
        rss_mb=round(median_mb(blocks[-1], steady), 1),
        parts_mb=[round(median_rest_mb(block), 1) for block in blocks],
        mb_per_hour=round(slope, 2),
        mb_per_hour_interval=round(interval, 2),
        fds=least(blocks[-1], "fds") - least(blocks[0], "fds"),
        threads=least(blocks[-1], "threads") - least(blocks[0], "threads"),
        grown_mb={kind: round(mb, 1) for kind, mb in sorted(grown.items(), key=lambda item: -item[1])},
    )


def _weights_mb(live: Flock) -> float:
    """When no model is on its way in or out, if that is soon: those take less memory than they are counted for."""
    until = time.monotonic() + _SETTLES_S
    while True:
        replicas = _replicas(live)
        used = sum(one["used_bytes"] for one in replicas)
        if used == sum(model["bytes"] for one in replicas for model in one["residents"]) or time.monotonic() > until:
            return float(used) / 1e6
        time.sleep(0.02)


def _replicas(live: Flock) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = httpx.get(f"{live.url}/v1/replicas", timeout=30).json()["data"]
    return found


def line(times: Sequence[float], values: Sequence[float]) -> tuple[float, float]:
    """The slope of the line of least squares through `NUM_BLOCKS` points, and its 95 % interval to either side."""
    slope, start = statistics.linear_regression(times, values)
    residual = sum((value - start - slope * at) ** 2 for at, value in zip(times, values, strict=True))
    spread = sum((at - statistics.mean(times)) ** 2 for at in times)
    return slope, _T * math.sqrt(residual / (len(times) - 2) / spread)


def kind_of(command: Sequence[str]) -> str:
    """Of a process: Ray's title without the replica's number, else the name of the program."""
    title = " ".join(command).split() or ["?"]
    return title[0].split("#")[0] if title[0].startswith("ray::") else Path(title[0]).name


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30)
    minutes = parser.parse_args().minutes
    with tempfile.TemporaryDirectory(prefix="rookery-soak-", ignore_cleanup_errors=True) as folder:
        found = soak(Path(folder), minutes)
    print(json.dumps(found.to_json()))
    sys.exit(not found.is_flat)


if __name__ == "__main__":
    main()
