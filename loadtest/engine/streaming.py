"""What streaming over HTTP and Ray Serve costs: the same texts over HTTP and in this process, in alternate rounds.

    python -m loadtest.engine.streaming

Two cases of 32 streams: one model, and eight models with four each. `http_efficiency` is the ratio of tokens a second,
the median over rounds, of the worse case; `ttft_added_ms` the difference of the median times to the first token, one
stream at a time. The side whose turn it is not is idle. The client shares the cores with the engine, as a client of a
laptop does, so it is as cheap as it can be; what it took is said.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import shutil
import statistics
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

import psutil  # type: ignore[import-untyped]

from loadtest.engine.work import CASES, NUM_MODELS, Case, Work
from loadtest.models import PEAKED, write_random_gpt2
from loadtest.server import running_server
from serve.generator import LocalGenerator
from serve.settings import Settings
from serve.types import GenerationRequest

NAMESPACE = "bench"
STREAMED = tuple(case for case in CASES if case.models * case.streams == 32)
BUDGET_BYTES = 6 << 30  # in this process; the models are mapped, or as many are copied
TTFT_TOKENS = 8  # the first is on its way to the caller while the others are written, as in use

Ask = Callable[[str, Work, int], Awaitable["Answer"]]  # model id, work, seed


@dataclass(frozen=True, slots=True)
class Answer:
    """One text that was streamed."""

    num_tokens: int
    first_s: float  # from the request to its first token
    num_pieces: int


@dataclass(slots=True)
class Streaming:
    """What was measured; one figure a round where it is a list."""

    rates: dict[str, list[tuple[float, float]]] = field(default_factory=dict)  # case -> tokens/s (HTTP, in process)
    first_s: list[tuple[float, float]] = field(default_factory=list)  # (HTTP, in process)
    pieces_s: list[float] = field(default_factory=list)  # of all streams together
    client_cores: list[float] = field(default_factory=list)
    service_cores: list[float] = field(default_factory=list)  # all that belongs to the service, the generator left out

    def efficiency(self, case: str) -> float:
        """Tokens a second over HTTP as a share of those in process."""
        return statistics.median(http / local for http, local in self.rates[case])

    @property
    def http_efficiency(self) -> float:
        return min(map(self.efficiency, self.rates))

    @property
    def ttft_added_ms(self) -> float:
        return self.ttft_http_ms - self.ttft_local_ms

    @property
    def ttft_http_ms(self) -> float:
        return 1000 * statistics.median(http for http, _ in self.first_s)

    @property
    def ttft_local_ms(self) -> float:
        return 1000 * statistics.median(local for _, local in self.first_s)

    def values(self) -> dict[str, float]:
        """What the line of JSON says."""
        return {
            "http_efficiency": self.http_efficiency,
            "ttft_added_ms": self.ttft_added_ms,
            **{f"http_efficiency_{case}": self.efficiency(case) for case in self.rates},
            **{f"http_tokens_s_{case}": statistics.median(a for a, _ in pairs) for case, pairs in self.rates.items()},
            **{f"local_tokens_s_{case}": statistics.median(b for _, b in pairs) for case, pairs in self.rates.items()},
            "ttft_http_ms": self.ttft_http_ms,
            "ttft_local_ms": self.ttft_local_ms,
            "pieces_s": statistics.median(self.pieces_s),
            "client_cores": statistics.median(self.client_cores),
            "service_cores": statistics.median(self.service_cores),
        }


# --- The two ways to a text ---------------------------------------------------------------------------------


class Http:
    """A client of a few microseconds a piece: a socket for each stream, and no parsing but of the last event."""

    def __init__(self, url: str) -> None:
        address = urlsplit(url)
        self._host, self._port = address.hostname, address.port

    async def ask(self, model_id: str, work: Work, seed: int) -> Answer:
        started = time.perf_counter()
        reader, writer = await asyncio.open_connection(self._host, self._port)
        try:
            writer.write(_request(model_id, work, seed))
            tail, num_pieces, first_s = b"", 0, 0.0
            while piece := await reader.read(1 << 16):
                num_pieces += 1
                tail = tail[-1024:] + piece  # the last event is smaller
                if not first_s and b"data:" in tail:
                    first_s = time.perf_counter() - started
        finally:
            writer.close()
        usage = re.search(rb'"completion_tokens":(\d+)', tail)
        if usage is None or b"[DONE]" not in tail:
            raise RuntimeError(f"the stream did not end as it should: {tail[-500:]!r}")
        return Answer(int(usage[1]), first_s, num_pieces)


def _request(model_id: str, work: Work, seed: int) -> bytes:
    body = json.dumps(
        work.completion(model_id, seed) | {"stream": True, "stream_options": {"include_usage": True}}
    ).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
        f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
    )
    return head.encode() + body


class InProcess:
    """The service's own generator here, of which nothing but the first token and the whole text is asked."""

    def __init__(self, generator: LocalGenerator) -> None:
        self._generator = generator

    async def ask(self, model_id: str, work: Work, seed: int) -> Answer:
        request = GenerationRequest(
            model_id,
            (work.prompt_ids,),
            {
                "max_new_tokens": work.num_tokens,
                "min_new_tokens": work.num_tokens,
                "top_p": work.top_p,
                "temperature": work.temperature,
            },
            seed=seed,
            is_whole=True,
        )
        started, first_s, num_tokens, num_pieces = time.perf_counter(), 0.0, 0, 0
        async for deltas in self._generator.generate(request):
            num_pieces += 1
            first_s = first_s or time.perf_counter() - started
            num_tokens += sum(len(delta.tokens) for delta in deltas)
        return Answer(num_tokens, first_s, num_pieces)


@asynccontextmanager
async def generator_here(data: Path, weights: str) -> AsyncIterator[InProcess]:
    """A generator with the settings of the service over the same models."""
    generator = LocalGenerator(Settings(data=data, dtype=weights, memory_bytes=BUDGET_BYTES, hub_enabled=False))
    try:
        yield InProcess(generator)
    finally:
        await generator.close()


# --- Measuring ----------------------------------------------------------------------------------------------


async def measure(
    url: str, data: Path, model_ids: Sequence[str], weights: str, work: Work, *, rounds: int, num_first: int = 20
) -> Streaming:
    """Both ways in alternate rounds over the same models; `url` is a service over `data`, a child of this process."""
    found = Streaming()
    async with generator_here(data, weights) as here:
        ways: list[Ask] = [Http(url).ask, here.ask]
        for ask in ways:
            for case in STREAMED:
                await all_streams(ask, case, model_ids, Work(num_tokens=4), seed=0)
        for number in range(rounds):
            for case in STREAMED:
                found.rates.setdefault(case.name, []).append(await _round(ways, case, model_ids, work, number, found))
        few = Work(work.prompt_ids, TTFT_TOKENS, work.top_p, work.temperature)
        for number in range(num_first):
            http, local = [(await ask(model_ids[0], few, number)).first_s for ask in ways]
            found.first_s.append((http, local))
    return found


async def _round(
    ways: Sequence[Ask], case: Case, model_ids: Sequence[str], work: Work, number: int, found: Streaming
) -> tuple[float, float]:
    over_http, here = ways
    others, used = _service_seconds(), time.process_time()
    answers, http_s = await all_streams(over_http, case, model_ids, work, seed=number)
    found.client_cores.append((time.process_time() - used) / http_s)
    found.service_cores.append((_service_seconds() - others) / http_s)
    found.pieces_s.append(sum(answer.num_pieces for answer in answers) / http_s)
    same, local_s = await all_streams(here, case, model_ids, work, seed=number)
    return _num_tokens(answers) / http_s, _num_tokens(same) / local_s


async def all_streams(
    ask: Ask, case: Case, model_ids: Sequence[str], work: Work, seed: int
) -> tuple[list[Answer], float]:
    """The case's streams at once, and how long it took until the last had ended."""
    started = time.perf_counter()
    asked = [
        ask(model_id, work, seed * case.streams + stream)
        for stream in range(case.streams)
        for model_id in model_ids[: case.models]
    ]
    answers = await asyncio.gather(*asked)
    return answers, time.perf_counter() - started


def _num_tokens(answers: Sequence[Answer]) -> int:
    return sum(answer.num_tokens for answer in answers)


def _service_seconds() -> float:
    """CPU time of this process's descendants so far, but for those that write texts."""
    seconds = 0.0
    for process in psutil.Process().children(recursive=True):
        try:
            if ":generator" not in process.cmdline()[0]:
                seconds += sum(process.cpu_times()[:2])
        except (psutil.Error, IndexError):
            continue
    return seconds


# --- The run ------------------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=200, help="of each stream")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--weights", default="bfloat16")
    parser.add_argument("--tiny", action="store_true", help="only whether it runs: tiny models")
    args = parser.parse_args()
    data = Path(tempfile.mkdtemp(prefix="rookery-streaming-"))
    model_ids = [f"{NAMESPACE}/m{number}" for number in range(NUM_MODELS)]
    shape = {"n_layer": 2, "n_embd": 64, "n_head": 2} if args.tiny else None
    try:
        for seed, model_id in enumerate(model_ids):
            write_random_gpt2(data / "models" / model_id, seed=seed, final_scale=PEAKED, shape=shape)
        with running_server(data, args.weights) as url:
            work = Work(num_tokens=args.tokens)
            found = asyncio.run(measure(url, data, model_ids, args.weights, work, rounds=args.rounds))
    finally:
        shutil.rmtree(data, ignore_errors=True)
    print(json.dumps({name: float(f"{value:.4g}") for name, value in found.values().items()}))  # noqa: T201


if __name__ == "__main__":
    main()
