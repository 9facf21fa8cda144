"""What counting and logging cost: two services that differ in nothing else, by turns, and each act by itself."""

from __future__ import annotations

import asyncio
import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
from prometheus_client.parser import text_string_to_metric_families
from transformers.utils.logging import disable_progress_bar

from deployments.haproxy import free_port
from loadtest.models import PEAKED, write_random_gpt2

OFF = {"ROOKERY_METRICS_ENABLED": "0", "ROOKERY_LOG_LEVEL": "error"}
MODEL = "overhead/bot"
_CLIENTS = 8
_TOKENS = 32
_WARM_UPS = 2
_RESAMPLES = 2000

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Overhead:
    """In per cent of throughput; the interval holds the true median of rounds like these with 95 %."""

    percent: float
    low: float
    high: float
    num_pairs: int
    direct_percent: float  # by the times below
    step_us: float  # of counting one step
    request_us: float  # of counting a request and its lines of log
    mean_step_us: float
    mean_request_us: float
    tokens_s: float

    def as_figures(self) -> dict[str, float | list[float]]:
        return {
            "overhead_percent": round(self.percent, 2),
            "overhead_interval_percent": [round(self.low, 2), round(self.high, 2)],
            "overhead_pairs": self.num_pairs,
            "overhead_direct_percent": round(self.direct_percent, 3),
            "counting_us_per_step": round(self.step_us, 1),
            "step_us": round(self.mean_step_us),
            "counting_us_per_request": round(self.request_us, 1),
            "request_us": round(self.mean_request_us),
            "tokens_s": round(self.tokens_s),
        }


def measure(folder: Path, blocks: int, say: Say) -> Overhead:
    """`blocks` times on, off, off, on: short rounds, so that what else the machine does is alike for neighbours.

    `folder`: an empty one to work in.
    """
    disable_progress_bar()  # of writing files
    write_random_gpt2(folder / "model", seed=0, final_scale=PEAKED)
    with ExitStack() as stack:
        on = stack.enter_context(_service(folder, "on", {}))
        off = stack.enter_context(_service(folder, "off", OFF))
        for url in (on, off) * _WARM_UPS:
            asyncio.run(_round(url))
        pairs: list[tuple[float, float]] = []
        for _ in range(blocks):
            first, second, third, fourth = (asyncio.run(_round(url)) for url in (on, off, off, on))
            pairs += [(first, second), (fourth, third)]
        say(f"tokens a second with: {_median(pairs, 0):.0f}, without: {_median(pairs, 1):.0f}, {len(pairs)} pairs")
        text = httpx.get(f"{on}/metrics", timeout=10).text
        nothing = httpx.get(f"{off}/metrics", timeout=10).text
        assert not nothing.strip("# EOF\n"), "the service without metrics counts, too"
    mean_step_s, mean_request_s, steps_per_request = _means(text)
    step_us, request_us = direct_costs(folder)
    busy_us = steps_per_request * mean_step_s * 1e6
    losses = [100 * (1 - with_ / without) for with_, without in pairs]
    low, high = interval(losses)
    return Overhead(
        percent=statistics.median(losses),
        low=low,
        high=high,
        num_pairs=len(pairs),
        direct_percent=100 * (steps_per_request * step_us + request_us) / busy_us,
        step_us=step_us,
        request_us=request_us,
        mean_step_us=mean_step_s * 1e6,
        mean_request_us=mean_request_s * 1e6,
        tokens_s=_median(pairs, 0),
    )


def _median(pairs: Sequence[tuple[float, float]], which: int) -> float:
    return statistics.median(pair[which] for pair in pairs)


def interval(values: Sequence[float], seed: int = 0) -> tuple[float, float]:
    """The 95 % interval of the median, by drawing again with replacement."""
    draw = random.Random(seed)
    medians = sorted(statistics.median(draw.choices(values, k=len(values))) for _ in range(_RESAMPLES))
    return medians[round(0.025 * _RESAMPLES)], medians[round(0.975 * _RESAMPLES) - 1]


@contextmanager
def _service(folder: Path, name: str, variables: dict[str, str]) -> Iterator[str]:
    data = folder / name
    target = data / "models" / MODEL
    target.mkdir(parents=True)
    for file in (folder / "model").iterdir():
        os.link(file, target / file.name)
    settings = {
        "ROOKERY_DATA": str(data),
        "ROOKERY_BASE": MODEL,
        "ROOKERY_HUB_ENABLED": "0",
        "ROOKERY_LOG_FILE": str(data / "log.jsonl"),
    }
    command = [sys.executable, "-m", "tests.monitoring.one_process", f"--port={(port := free_port())}"]
    environment = {**os.environ, **settings, **variables}
    root = Path(__file__).parents[2]
    with (folder / f"{name}.log").open("wb") as log:
        process = subprocess.Popen(command, env=environment, cwd=root, stdout=subprocess.PIPE, stderr=log, text=True)
    assert process.stdout is not None
    try:
        said = process.stdout.readline()
        assert said == "ready\n", (folder / f"{name}.log").read_text(errors="replace")[-2000:]
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()


async def _round(url: str) -> float:
    """Tokens a second of streams that begin together: the work is the same every time, the time differs."""

    async def call(client: httpx.AsyncClient) -> None:
        body = {"model": MODEL, "prompt": "a", "max_tokens": _TOKENS, "ignore_eos": True, "stream": True}
        async with client.stream("POST", "/v1/completions", json=body) as reply:
            assert reply.status_code == 200
            async for _ in reply.aiter_bytes():
                pass

    async with httpx.AsyncClient(base_url=url, timeout=60) as client:
        started = time.perf_counter()
        await asyncio.gather(*(call(client) for _ in range(_CLIENTS)))
        return _CLIENTS * _TOKENS / (time.perf_counter() - started)


def _means(text: str) -> tuple[float, float, float]:
    """Of what the service has counted: seconds a step, seconds a request, steps a request (of all together)."""
    samples = {
        (sample.name, sample.labels.get("route", "")): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }
    route = "/v1/completions"
    steps, requests = "rookery_step_duration_seconds", "rookery_request_duration_seconds"
    num_steps, num_requests = samples[f"{steps}_count", ""], samples[f"{requests}_count", route]
    mean_request_s = samples[f"{requests}_sum", route] / num_requests
    return samples[f"{steps}_sum", ""] / num_steps, mean_request_s, num_steps / num_requests


def direct_costs(folder: Path) -> tuple[float, float]:
    """Microseconds of counting a step, and of counting a request with its line of log, as the service does both.

    In a process of its own: how it counts and logs is for the whole of a process.
    """
    command = [sys.executable, "-m", "tests.monitoring.costs", str(folder / "costs")]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, cwd=root, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=True)
    found = json.loads(done.stdout)
    return found["step_us"], found["request_us"]
