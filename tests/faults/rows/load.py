"""More than can be done, for longer than anybody watches, and by more models than there is room for."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import defaultdict
from itertools import pairwise
from pathlib import Path
from typing import Any

from loadtest.results.files import read
from tests.faults.live import MODELS, flock
from tests.faults.row import Measured, row
from tests.faults.rows.model import publish
from tests.faults.soak import soak
from tests.faults.traffic import Traffic, make_asks

_PLAN = """
about = "Short and long texts by four models that are in memory."
duration_s = {duration_s}
warmup_s = 5
timeout_s = 60

[arrivals]
times_capacity = 1

[models]
count = 4

[requests]
streaming = 0.8
output_tokens = [10, 60]
"""
_OVER = 3
_NUM_HOT, _NUM_FIT = 12, 4
_MODEL_BYTES = 21_000_000  # of one of the flock, with what a slot rounds it up to


@row(
    "F24",
    did="open-loop load at 3 times the peak of a closed loop, 1 generator",
    expected="90 % of the peak's tokens; the rest refused with Retry-After; p99 of those let in within 2 times",
    minutes=4,
)
def overload(folder: Path, share: float) -> Measured:
    plan = folder / "peak.toml"
    plan.write_text(_PLAN.format(duration_s=max(10, round(60 * share))))
    with flock(folder / "data", generators=1) as live:
        peak = play(plan, live.url, "--out", str(folder / "peak.jsonl"))
        capacity_rps = float(str(read(folder / "peak.jsonl").header.facts["capacity_rps"]))
        over = play(plan, live.url, "--rate", str(_OVER * capacity_rps))
    goodput = over["goodput_tokens_s"] / peak["goodput_tokens_s"]
    slower = over["p99_ms"] / peak["p99_ms"]
    return Measured(
        f"{goodput:.0%} of {peak['goodput_tokens_s']:.0f} tokens/s; {over['refused_share']:.0%} refused, "
        f"{over['errors']} errors of {over['requests']:,}; p99 {over['p99_ms'] / 1000:.1f} s, {slower:.1f} times",
        goodput >= 0.9 and over["errors"] == 0 and slower <= 2,
        {"peak": peak, "over": over},
    )


@row(
    "F28",
    did="30 minutes of changing favourites, hang-ups, imports, deletions and training",
    expected="memory flat after the warm-up: 1 MB/h is within the interval of the slope; open files, threads +- 2",
    minutes=33,
)
def soaked(folder: Path, share: float) -> Measured:
    found = soak(folder, minutes=max(1.0, 30 * share))
    return Measured(
        f"{found.mb_per_hour:+.1f} +- {found.mb_per_hour_interval:.1f} MB/h of {found.rss_mb:.0f} MB, open files "
        f"{found.fds:+d}, threads {found.threads:+d}, in {found.minutes:g} minutes with {found.requests:,} requests, "
        f"{found.errors} errors, {found.churned} models made and deleted, {found.jobs_done} jobs",
        found.is_flat and found.errors == 0,
        found.to_json(),
    )


@row(
    "F30",
    did="12 models asked for in turn by 12 clients, room for 4, 600 texts",
    expected="no model waits more than 30 s, none lost, p99 below 30 s",
    minutes=3,
)
def storm(folder: Path, share: float) -> Measured:
    wanted = max(36, round(600 * share))
    models = [*MODELS, *(f"flock/hot{number}" for number in range(_NUM_HOT - len(MODELS)))]
    with flock(folder / "data", generators=1, ROOKERY_MEMORY_BYTES=str(_NUM_FIT * _MODEL_BYTES)) as live:
        for number, model in enumerate(models[len(MODELS) :]):
            publish(live, model, seed=100 + number)
        asks = [make_asks([model], 1, seed=number)[0] for number, model in enumerate(models)]
        with Traffic(live.url, asks, unary=6, streams=6, pause_s=0.0) as traffic:
            traffic.wait_for(wanted)
        loads, reloads = live.count("rookery_model_loads_total"), live.count("rookery_model_reloads_total")
    verdict = traffic.verdict()
    took = sorted(one.ended_s - one.began_s for one in traffic.outcomes if one.ended == "whole")
    ends = defaultdict(list)
    for one in traffic.outcomes:
        if one.ended == "whole":
            ends[one.ask.model].append(one.ended_s)
    gaps = [after - before for times in ends.values() for before, after in pairwise(times)]
    p99 = took[min(len(took) - 1, int(0.99 * len(took)))]
    return Measured(
        f"{verdict.lost} of {verdict.requests:,} lost, {verdict.refused} refused; {reloads:.0f} of {loads:.0f} loads "
        f"were again; p99 {p99:.1f} s, the longest a model waited {max(gaps):.1f} s",
        verdict.lost == verdict.refused == 0 and len(ends) == _NUM_HOT and max(gaps) <= 30 and p99 <= 30,
        {"reloads": reloads, "loads": loads, "p50_s": took[len(took) // 2], "p99_s": p99, "longest_gap_s": max(gaps)},
    )


def play(plan: Path, url: str, *options: str) -> dict[str, Any]:
    """The figures of a load test."""
    command = [sys.executable, "-m", "loadtest", "run", str(plan), "--url", url, "--models", ",".join(MODELS), "--json"]
    said = subprocess.run([*command, *options], stdout=subprocess.PIPE, text=True, check=True)
    figures: dict[str, Any] = json.loads(said.stdout.splitlines()[-1])
    return figures
