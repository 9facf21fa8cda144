"""The engine against `model.generate`, llama.cpp's server and the machine's memory, side by side in one run.

    python -m loadtest.engine.bench

Eight distinct models of GPT-2-small shape (random weights), the prompt "<|endoftext|>My dream is", 60 new tokens,
top-p 0.95, temperature 1. Contenders take turns, case by case, and a ratio is the median over rounds of the ratio
within a round. Prints tables, then one line of JSON; null where a peer cannot be had, with the reason above.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import logging
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

import psutil  # type: ignore[import-untyped]
import torch
import transformers
from rich.console import Console
from rich.table import Table

from loadtest import models
from loadtest.engine import streaming
from loadtest.engine.cold import measure_cold_starts
from loadtest.engine.floor import Bandwidth
from loadtest.engine.http import Http
from loadtest.engine.local import Local, memory_of_own_process
from loadtest.engine.work import CASES, NUM_MODELS, PROMPT_IDS, Contender, PeerUnavailableError, Rounds, Work
from loadtest.models import PEAKED, write_random_gpt2
from loadtest.peers import gguf, llamacpp
from loadtest.peers.generate import Generate, greedy, load_and_touch
from loadtest.server import running_server

NAMESPACE = "bench"
FORMATS = {"bf16": "bfloat16", "int8": "int8"}  # of the engine, by the names of the results
GGUF_KINDS = {"bf16": "bf16", "int8": "q8_0"}  # llama.cpp's format of the same size
FLOOR_RUNS = 5
OVERHEAD_BYTES = 3 << 30  # of the generator in which models come and go: a few models, and room for sequences
LEAST_ROUNDS = 2
STREAMING_S = 60  # kept for what follows the rounds

console = Console(stderr=True)


@dataclass
class Report:
    """What was measured, and why something was not."""

    values: dict[str, float | None] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)

    def missing(self, what: str, reason: object) -> None:
        self.reasons[what] = str(reason)
        console.print(f"[yellow]without {what}[/yellow]: {reason}")

    def reason(self, key: str) -> str:
        """Why `key` has no value."""
        is_http = key.startswith(("http", "ttft")) or (key.startswith("vs_llamacpp_") and "in_process" not in key)
        parts = {"llama.cpp": "llamacpp" in key, "rookery int8": "int8" in key, "rookery up": is_http}
        return next(self.reasons[part] for part, is_part in parts.items() if is_part and part in self.reasons)


@dataclass(frozen=True, slots=True)
class Setup:
    """The models on disk, and what to do with them."""

    args: argparse.Namespace
    work: Work
    data: Path
    binary: Path | None  # llama.cpp's server

    @property
    def model_ids(self) -> list[str]:
        return [f"{NAMESPACE}/m{i}" for i in range(NUM_MODELS)]

    @property
    def folders(self) -> list[Path]:
        return [self.data / "models" / model_id for model_id in self.model_ids]

    def ggufs(self, name: str) -> list[Path]:
        return [self.data / f"m{i}.{GGUF_KINDS[name]}.gguf" for i in range(NUM_MODELS)]


def write_models(args: argparse.Namespace, cache: Path) -> None:
    """The models in the forms that their readers want."""
    shape = {"n_layer": 2, "n_embd": 64, "n_head": 2} if args.tiny else None
    for seed in range(NUM_MODELS):
        folder = cache / "models" / NAMESPACE / f"m{seed}"
        write_random_gpt2(folder, seed=seed, final_scale=PEAKED, shape=shape)
        (folder / "model.safetensors").chmod(0o444)  # as published: only such a file is mapped
        if args.llamacpp:
            for kind in GGUF_KINDS.values():
                gguf.convert(folder, cache / f"m{seed}.{kind}.gguf", kind)


def linked_models(args: argparse.Namespace) -> Path:
    """A new folder with the models, which are written once and kept beside the built peer; all in the page cache."""
    recipe = "".join(Path(source).read_text() for source in (models.__file__, gguf.__file__))
    key = hashlib.sha256(f"{recipe}{args.tiny}{args.llamacpp}".encode()).hexdigest()[:12]
    kept = args.peers / f"models-{key}"
    if not kept.exists():
        console.print(f"writing {NUM_MODELS} models to {kept}")
        fresh = Path(tempfile.mkdtemp(prefix="models-", dir=args.peers))
        write_models(args, fresh)
        os.sync()  # what goes to disk later would take its part of the memory's bandwidth
        fresh.rename(kept)
    data = Path(tempfile.mkdtemp(prefix="run-", dir=args.peers))
    shutil.copytree(kept, data, copy_function=os.link, dirs_exist_ok=True)
    for path in data.rglob("*"):
        if path.is_file():
            _cache_in_order(path)
    return data


def _cache_in_order(path: Path) -> None:
    """Into the page cache as a published file lies there: in the large pieces of a read from the disk."""
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        while file.read(8 << 20):
            pass


# --- Parts ------------------------------------------------------------------------------------------------------


def measure_cold(setup: Setup, report: Report) -> None:
    """First token of a model that is not in memory: ours, transformers' and llama.cpp's."""
    ours = asyncio.run(measure_cold_starts(setup.data, setup.model_ids, FORMATS["bf16"], OVERHEAD_BYTES, setup.work))
    loads = [_seconds(lambda folder=folder: load_and_touch(folder)) for folder in setup.folders]  # type: ignore[misc]
    report.values |= {
        "cold_start_ms": 1000 * ours.cost_s,
        "cold_reload_ms": 1000 * ours.reload_s,
        "ttft_resident_ms": 1000 * statistics.median(ours.resident),
        "from_pretrained_ms": 1000 * statistics.median(loads),
        "vs_from_pretrained_load": statistics.median(loads) / ours.cost_s,
    }
    report.values["vs_llamacpp_swap"] = None
    if setup.binary:
        cores = len(os.sched_getaffinity(0))
        swaps = [llamacpp.swap_s(setup.binary, path, setup.work, threads=cores) for path in setup.ggufs("bf16")]
        report.values["llamacpp_swap_ms"] = 1000 * statistics.median(swaps)
        report.values["vs_llamacpp_swap"] = statistics.median(swaps) / ours.cost_s


def contenders(setup: Setup, report: Report, stack: ExitStack) -> Iterator[Contender]:
    """Ours and every peer that can be had, closed by `stack`; their memory is noted."""
    for name, weights in FORMATS.items():
        try:
            local = stack.enter_context(closing(Local(setup.folders, weights)))
        except PeerUnavailableError as exc:
            report.missing(f"rookery {name}", exc)
            continue
        if name == "bf16":
            report.values["memory_mib"] = memory_of_own_process(setup.folders, weights) / 2**20
        yield local
    yield Generate(setup.folders)
    if setup.binary:
        yield from _llamacpp(setup, setup.binary, report, stack)
    if setup.args.http:
        url = stack.enter_context(running_server(setup.data, FORMATS["bf16"]))
        yield Http(url, setup.model_ids)


def _llamacpp(setup: Setup, binary: Path, report: Report, stack: ExitStack) -> Iterator[Contender]:
    try:
        num_tokens = 16
        expected = greedy(setup.folders[0], PROMPT_IDS, num_tokens)
        same = llamacpp.greedy(binary, setup.ggufs("bf16")[0], PROMPT_IDS, num_tokens) == expected
        console.print(f"llama.cpp and transformers choose {'the same' if same else 'DIFFERENT'} {num_tokens} tokens")
        cores = len(os.sched_getaffinity(0))
        for name in FORMATS:
            paths = setup.ggufs(name)
            threads = llamacpp.best_threads(binary, paths[0], setup.work, range(1, cores + 1))
            console.print(f"llama.cpp {name}: fastest with {threads} threads for one model; 1 each for {NUM_MODELS}")
            # One thread each: measured, two servers of two threads on two cores already get in each other's way.
            peer = llamacpp.LlamaCpp(f"llama.cpp {name}", binary, paths, one_threads=threads, many_threads=1)
            stack.enter_context(closing(peer))
            yield peer
            if name == "bf16":
                report.values["llamacpp_memory_mib"] = peer.memory_bytes / 2**20
    except PeerUnavailableError as exc:
        report.missing("llama.cpp", exc)


def measure_streaming(setup: Setup, rounds: Rounds, report: Report) -> None:
    """What HTTP and Ray take of the engine's speed, and add to a first token."""
    report.values |= {"http_efficiency": None, "ttft_added_ms": None}
    for contender in rounds.contenders:
        if isinstance(contender, Http):
            found = asyncio.run(
                streaming.measure(contender.url, setup.data, setup.model_ids, FORMATS["bf16"], setup.work, rounds=3)
            )
            report.values |= {"http_efficiency": found.http_efficiency, "ttft_added_ms": found.ttft_added_ms}


def take_rounds(rounds: Rounds, bandwidth: Bandwidth, num_rounds: int, deadline: float) -> None:
    """As many rounds as there is time for, `num_rounds` at most and `LEAST_ROUNDS` at least."""
    rounds.warm_up()
    took = 0.0
    for number in range(num_rounds):
        if number >= LEAST_ROUNDS and time.monotonic() + took > deadline:
            console.print(f"no time for more than {number} rounds")
            break
        took = _seconds(lambda: rounds.take(bandwidth.sample))
        console.print(f"round {number + 1} of {num_rounds}: {took:.0f} s")


# --- Results ----------------------------------------------------------------------------------------------------


def ratios(rounds: Rounds) -> dict[str, float | None]:
    """Ours against each peer. `generate` answers 4 requests a model as fast as 1: one after another."""
    generate = "generate bf16"
    values: dict[str, float | None] = {}
    for name, weights in FORMATS.items():
        for many in ("8x1", "8x4"):
            values[f"vs_generate_{many}_{name}"] = rounds.ratio(f"rookery {weights}", generate, many, "8x1")
    for case in CASES:  # server against server
        values[f"vs_llamacpp_{case.name}"] = rounds.ratio("rookery bfloat16 http", "llama.cpp bf16", case.name)
    for name, weights in FORMATS.items():
        for case in CASES:
            key = f"vs_llamacpp_{case.name}_in_process_{name}"
            values[key] = rounds.ratio(f"rookery {weights}", f"llama.cpp {name}", case.name)
    return values


def measure_floor(rounds: Rounds, work: Work, bandwidth: Bandwidth) -> dict[str, float | None]:
    """Step time a distinct model at one row, against the time that reading its weights takes in the same second.

    Each run of steps lies between two samples of the bandwidth, which changes by half from minute to minute here; the
    faster of the two counts.
    """
    values: dict[str, float | None] = dict.fromkeys(f"floor_ratio_{name}" for name in FORMATS)
    case = next(case for case in CASES if case.models == NUM_MODELS and case.streams == 1)
    for name, weights in FORMATS.items():
        for contender in rounds.contenders:
            if isinstance(contender, Local) and contender.name == f"rookery {weights}":
                steps, shares = [], []
                for seed in range(FLOOR_RUNS):
                    before = bandwidth.sample()
                    contender.run(case, work, seed)
                    floor_s = contender.streamed_bytes / max(before, bandwidth.sample())
                    steps.append(contender.step_s(NUM_MODELS) / NUM_MODELS)
                    shares.append(steps[-1] / floor_s)
                values |= {
                    f"floor_ratio_{name}": statistics.median(shares),
                    f"step_ms_a_model_{name}": 1000 * statistics.median(steps),
                }
    return values


def rates_table(rounds: Rounds) -> Table:
    table = Table(title=f"tokens/s: median of {rounds.num_taken} interleaved rounds (least to most)")
    table.add_column("contender")
    for case in CASES:
        table.add_column(case.name if "x" in case.name else f"1x{case.name}", justify="right")
    for contender in rounds.contenders:
        cells = []
        for case in CASES:
            rates = rounds.rates.get((contender.name, case.name))
            spread = f"{statistics.median(rates):.0f} ({min(rates):.0f} to {max(rates):.0f})" if rates else "-"
            cells.append(spread)
        table.add_row(contender.name, *cells)
    return table


def values_table(report: Report) -> Table:
    table = Table(title="ratios are ours over theirs; floor ratios are step time over the time to read the weights")
    table.add_column("value")
    table.add_column("measured", justify="right")
    for key, value in report.values.items():
        table.add_row(key, "-" if value is None else f"{value:.2f}")
    return table


def environment() -> dict[str, str]:
    """Machine, versions, commit and command."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")
    cores, memory = len(os.sched_getaffinity(0)), psutil.virtual_memory().total >> 30
    names = ("torch", "transformers", "ray")
    return {
        "machine": f"{cpu}, {cores} cores, {memory} GiB, {torch.backends.cpu.get_cpu_capability()}",
        "versions": ", ".join([f"{n} {version(n)}" for n in names] + [f"llama-cpp-python {llamacpp.VERSION}"]),
        "commit": _git("rev-parse", "--short", "HEAD") + (" and changes" if _git("status", "--porcelain") else ""),
        "command": "python -m loadtest.engine.bench " + " ".join(sys.argv[1:]),
    }


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], capture_output=True, text=True, check=False)
    return done.stdout.strip()


def _seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


# --- The run ----------------------------------------------------------------------------------------------------


def measure(setup: Setup, report: Report, deadline: float) -> Rounds:
    bandwidth = Bandwidth(setup.args.bandwidth_bytes)
    measure_cold(setup, report)
    with ExitStack() as stack:
        rounds = Rounds(list(contenders(setup, report, stack)), setup.work)
        take_rounds(rounds, bandwidth, setup.args.rounds, deadline - STREAMING_S)
        measure_streaming(setup, rounds, report)
        report.values |= measure_floor(rounds, setup.work, bandwidth)
    report.values |= ratios(rounds)
    report.values |= {"read_gb_s": bandwidth.best / 1e9, "read_gb_s_median": bandwidth.median / 1e9}
    return rounds


@contextmanager
def prepared(args: argparse.Namespace, report: Report) -> Iterator[Setup]:
    """The peer built and the models written: what is kept of a run for the next, and not timed."""
    args.peers.mkdir(parents=True, exist_ok=True)
    binary = None
    if not args.http:
        report.missing("rookery up", "left out by an option")
    try:
        binary = llamacpp.build_server(args.peers) if args.llamacpp else None
        if binary is None:
            report.missing("llama.cpp", "left out by an option")
    except PeerUnavailableError as exc:
        report.missing("llama.cpp", exc)
    data = linked_models(args)
    try:
        yield Setup(args, Work(num_tokens=args.tokens), data, binary)
    finally:
        shutil.rmtree(data, ignore_errors=True)


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=5, help="at most; fewer where --minutes are over")
    parser.add_argument("--minutes", type=float, default=9, help="building the peer, which is done once, not counted")
    parser.add_argument("--peers", type=Path, default=Path.home() / ".cache" / "rookery-peers", help="built peers")
    parser.add_argument("--no-llamacpp", dest="llamacpp", action="store_false")
    parser.add_argument("--no-http", dest="http", action="store_false", help="without `rookery up`")
    parser.add_argument("--tiny", action="store_true", help="only whether it runs: tiny models, one round, no peers")
    args = parser.parse_args(arguments)
    args.bandwidth_bytes = 1 << 30
    if args.tiny:
        args.tokens, args.rounds, args.bandwidth_bytes = 4, 1, 64 << 20
        args.llamacpp = args.http = False
    return args


def main() -> None:
    args = parse_arguments()
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("httpx").setLevel(logging.WARNING)
    report = Report()
    with prepared(args, report) as setup:
        rounds = measure(setup, report, time.monotonic() + 60 * args.minutes)
    out = Console(width=130)
    for name, text in environment().items():
        out.print(f"{name}: {text}", soft_wrap=True)
    out.print(rates_table(rounds), values_table(report))
    for key, value in report.values.items():
        if value is None:
            out.print(f"without {key}: {report.reason(key)}", soft_wrap=True)
    print(json.dumps({key: _rounded(value) for key, value in report.values.items()}))  # noqa: T201


def _rounded(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.4g}")


if __name__ == "__main__":
    main()
