"""More models than fit: throughput, waits and fairness of the generator in one process, without HTTP.

    python -m loadtest.engine.thrash            # at most 5 minutes on 2 cores
    python -m loadtest.engine.thrash --soak     # 10,000 loads and evictions of tiny models: memory and slots

All models are one folder under many names (hard links): each is loaded into a slot of its own, and the page cache
holds them all, so that a load is the copy that it is where memory suffices. Closed loop: each of the clients asks for
a model drawn by a seeded generator, and asks again when it has its text. Ends with one JSON line.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import logging
import mmap
import os
import random
import shutil
import statistics
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from loadtest.models import PEAKED, write_random_gpt2
from serve.generator import LocalGenerator
from serve.settings import Settings
from serve.types import GenerationRequest, Tier

NAMESPACE = "thrash"
PROMPT = "My dream is"
FACTORS = (0.5, 1, 2, 10)  # models asked for, per model that fits
TINY = {"n_layer": 1, "n_head": 2, "n_embd": 32, "n_positions": 64}


@dataclass
class Answer:
    """One request as its client saw it; times in seconds."""

    began: float
    token_times: list[float] = field(default_factory=list)
    tier: Tier = "device"
    load_s: float = 0.0

    @property
    def ttft_s(self) -> float:
        return self.token_times[0] - self.began

    @property
    def took_s(self) -> float:
        return self.token_times[-1] - self.began

    @property
    def gaps_s(self) -> list[float]:
        return [b - a for a, b in zip(self.token_times, self.token_times[1:], strict=False)]


class Bench:
    """A folder of many names for one model, and generators with room for some of them."""

    def __init__(self, data: Path, args: argparse.Namespace, shape: Mapping[str, int] | None = None) -> None:
        self.data, self.args = data, args
        self._folder = data / "models" / NAMESPACE / "m0"
        write_random_gpt2(self._folder, seed=0, final_scale=PEAKED, shape=shape)
        for path in self._folder.iterdir():
            path.chmod(0o444)  # as published: such files are mapped
        self.drop_from_cache()
        (self._folder / "model.safetensors").read_bytes()  # in large pieces, as published files lie in the cache

    def add_models(self, count: int) -> None:
        """Names m0 .. m(count - 1)."""
        for number in range(1, count):
            folder = self._folder.with_name(f"m{number}")
            if not folder.exists():
                folder.mkdir()
                for path in self._folder.iterdir():
                    os.link(path, folder / path.name)

    def drop_from_cache(self) -> None:
        with (self._folder / "model.safetensors").open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    @asynccontextmanager
    async def generator(self, num_fit: int) -> AsyncIterator[LocalGenerator]:
        size = await self._model_bytes()
        generator = LocalGenerator(self._settings(num_fit * size))
        try:
            yield generator
        finally:
            await generator.close()

    async def _model_bytes(self) -> int:
        probe = LocalGenerator(self._settings(1 << 30))
        await ask(probe, 0, num_tokens=1)
        (resident,) = probe.view().residents
        await probe.close()
        return resident.num_bytes

    def _settings(self, memory_bytes: int) -> Settings:
        return Settings(
            data=self.data, base=f"{NAMESPACE}/m0", dtype=self.args.dtype, memory_bytes=memory_bytes,
            hub_enabled=False, flush_interval_s=0.0,
        )  # fmt: skip


async def ask(generator: LocalGenerator, model: int, *, num_tokens: int, seed: int = 0) -> Answer:
    request = GenerationRequest(
        f"{NAMESPACE}/m{model}", (PROMPT,), {"max_new_tokens": num_tokens, "ignore_eos": True}, seed=seed
    )
    answer = Answer(time.perf_counter())
    async for deltas in generator.generate(request):
        for delta in deltas:
            if delta.error:
                raise SystemExit(f"a request failed: {delta.error}")
            if delta.prompt:
                answer.tier, answer.load_s = delta.prompt.tier, delta.prompt.load_s
            answer.token_times += [time.perf_counter()] * len(delta.tokens)
    return answer


async def repeat_until(ends_at: float, work: Callable[[], Awaitable[Answer]]) -> list[Answer]:
    answers = []
    while time.perf_counter() < ends_at:
        answers.append(await work())
    return answers


# --- Thrash ---------------------------------------------------------------------------------------------------


async def measure_thrash(bench: Bench, factor: float) -> dict[str, float]:
    """Throughput and waits with `factor` times as many models as fit."""
    args = bench.args
    num_models = max(1, round(factor * args.fit))
    bench.add_models(num_models)
    rng = random.Random(args.seed)
    async with bench.generator(args.fit) as generator:

        def work() -> Awaitable[Answer]:
            return ask(generator, rng.randrange(num_models), num_tokens=args.tokens, seed=rng.randrange(1 << 30))

        for model in range(min(num_models, args.fit)):
            await ask(generator, model, num_tokens=1)
        began = time.perf_counter()
        clients = [repeat_until(began + args.seconds, work) for _ in range(args.clients)]
        answers = [answer for client in await asyncio.gather(*clients) for answer in client]
        took_s = time.perf_counter() - began
    return {
        "models": num_models,
        "tokens_s": round(sum(len(answer.token_times) for answer in answers) / took_s, 1),
        "ttft_p50_s": round(statistics.median(answer.ttft_s for answer in answers), 3),
        "ttft_p99_s": round(quantile([answer.ttft_s for answer in answers], 0.99), 3),
        "wait_for_weights_p99_s": round(quantile([answer.load_s for answer in answers], 0.99), 3),
        "longest_s": round(max(answer.took_s for answer in answers), 3),
        "cold_share": round(sum(answer.tier != "device" for answer in answers) / len(answers), 3),
        "requests": len(answers),
    }


# --- Warm models beside loads, and first tokens by tier -----------------------------------------------------------


async def measure_warm_beside_loads(bench: Bench) -> dict[str, float]:
    """Gaps between the tokens of one warm stream, while other models are loaded without a pause and while none is."""
    bench.add_models(8)
    quiet: list[float] = []
    loading: list[float] = []
    async with bench.generator(4) as generator:
        await ask(generator, 0, num_tokens=10)
        for _ in range(bench.args.rounds):
            quiet += (await ask(generator, 0, num_tokens=200)).gaps_s
            loads = asyncio.create_task(_load_for_ever(generator))
            loading += (await ask(generator, 0, num_tokens=200)).gaps_s
            loads.cancel()
            await asyncio.gather(loads, return_exceptions=True)
    return {
        "itl_ms": round(1e3 * statistics.mean(quiet), 2),
        "itl_during_loads_ms": round(1e3 * statistics.mean(loading), 2),
        "itl_ratio": round(statistics.mean(loading) / statistics.mean(quiet), 3),
        "itl_p99_ratio": round(quantile(loading, 0.99) / quantile(quiet, 0.99), 3),
    }


async def _load_for_ever(generator: LocalGenerator) -> None:
    """Each load brings one token of its model into the warm one's steps too, as it does in service."""
    for number in itertools.count():
        await ask(generator, 1 + number % 7, num_tokens=1)


async def measure_tiers(bench: Bench) -> dict[str, float]:
    """Median time to the first token by where the weights were: `device`, `host` (page cache), `disk`."""
    bench.add_models(4)
    times: dict[str, list[float]] = {"device": [], "host": [], "disk": []}
    async with bench.generator(2) as generator:
        for round_ in range(3 * bench.args.rounds):
            for model in range(4):
                if round_ % 3 == 2:
                    bench.drop_from_cache()
                cold = await ask(generator, model, num_tokens=1)
                times[cold.tier].append(cold.ttft_s)
                times["device"].append((await ask(generator, model, num_tokens=1)).ttft_s)
    return {f"ttft_{tier}_ms": round(1e3 * statistics.median(found), 1) for tier, found in times.items() if found}


# --- Fairness -------------------------------------------------------------------------------------------------


async def measure_flood(bench: Bench) -> dict[str, float]:
    """Times of a quiet model's texts, alone and while 64 clients ask another for longer ones; rounds alternate."""
    bench.add_models(2)
    alone: list[float] = []
    flooded: list[float] = []
    async with bench.generator(2) as generator:
        await ask(generator, 1, num_tokens=10)
        for round_ in range(bench.args.rounds):
            alone += [(await ask(generator, 1, num_tokens=60, seed=i)).took_s for i in range(6)]
            ends_at = time.perf_counter() + 3600
            flood = [asyncio.create_task(_flood(generator, ends_at, seed=100 * round_ + i)) for i in range(64)]
            await asyncio.sleep(1)
            flooded += [(await ask(generator, 1, num_tokens=60, seed=i)).took_s for i in range(6)]
            for task in flood:
                task.cancel()
            await asyncio.gather(*flood, return_exceptions=True)
            await asyncio.sleep(0.5)
    return {
        "quiet_alone_p50_s": round(statistics.median(alone), 3),
        "quiet_flooded_p50_s": round(statistics.median(flooded), 3),
        "quiet_p50_ratio": round(statistics.median(flooded) / statistics.median(alone), 3),
        "quiet_p99_ratio": round(quantile(flooded, 0.99) / quantile(alone, 0.99), 3),
    }


async def _flood(generator: LocalGenerator, ends_at: float, seed: int) -> None:
    await repeat_until(ends_at, lambda: ask(generator, 0, num_tokens=160, seed=seed))


# --- Soak -----------------------------------------------------------------------------------------------------


async def soak(bench: Bench, num_loads: int) -> dict[str, float]:
    """Loads and evicts tiny models; what memory has grown by in the second half, and slots that are lost."""
    num_fit, num_models = 4, 16
    bench.add_models(num_models)
    times: list[float] = []
    sizes: list[float] = []
    async with bench.generator(num_fit) as generator:
        began = time.perf_counter()
        for number in range(num_loads):
            answer = await ask(generator, number % num_models, num_tokens=1, seed=number)
            assert answer.tier != "device"
            if number >= num_loads // 2 and number % 20 == 0:
                times.append(time.perf_counter() - began)
                sizes.append(resident_mib())
        took_s = time.perf_counter() - began
        held = {resident.model_id for resident in generator.view().residents}
        again = [await ask(generator, (num_loads - 1 - back) % num_models, num_tokens=1) for back in range(num_fit)]
    slope = statistics.linear_regression(times, sizes).slope
    return {
        "loads": num_loads,
        "loads_s": round(num_loads / took_s, 1),
        "rss_mib": round(sizes[-1], 1),
        "rss_mib_per_h": round(3600 * slope, 2),
        "rss_kib_per_load": round(1024 * slope * took_s / num_loads, 3),
        "slots_lost": num_fit - len(held) + sum(answer.tier != "device" for answer in again),
    }


def resident_mib() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE / 2**20


def quantile(values: list[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


async def run(data: Path, args: argparse.Namespace) -> dict[str, Any]:
    result: dict[str, Any] = {
        "cores": len(os.sched_getaffinity(0)), "dtype": args.dtype, "torch": torch.__version__, "seed": args.seed,
        "load_average": os.getloadavg()[0],
    }  # fmt: skip
    if args.soak:
        return result | await soak(Bench(data, args, TINY), args.soak)
    bench = Bench(data, args)
    for factor in FACTORS:
        result[f"thrash_{factor:g}x"] = found = await measure_thrash(bench, factor)
        print(f"{factor:g} times what fits:", found, flush=True)  # noqa: T201
    for measure in (measure_warm_beside_loads, measure_tiers, measure_flood):
        found = await measure(bench)
        print(measure.__name__, found, flush=True)  # noqa: T201
        result |= found
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fit", type=int, default=4, help="models that fit")
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=30, help="of each answer")
    parser.add_argument("--seconds", type=float, default=20, help="for each number of models")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--soak", type=int, nargs="?", const=10_000, default=0, metavar="LOADS")
    args = parser.parse_args()
    logging.disable(logging.INFO)
    data = Path(tempfile.mkdtemp(prefix="rookery-thrash-"))
    try:
        print(json.dumps(asyncio.run(run(data, args))))  # noqa: T201
    finally:
        shutil.rmtree(data, ignore_errors=True)


if __name__ == "__main__":
    main()
