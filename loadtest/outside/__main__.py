"""Does another tool report what ours does? The same calls by each in turns, each in a process of its own.

    python -m loadtest.outside [--url URL --models a,b] [--key KEY] [--rounds 5]

Without a URL it starts `rookery up` with a random GPT-2 of the small shape. The others are Locust and the `openai`
client, as far as they are installed. Latencies of theirs count from the sending and ours from when a call was due: the
traffic is so light that they should not differ. The last line is one of JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import TypeAlias

from rich.console import Console
from rich.table import Table

from loadtest.models import write_linked_models
from loadtest.outside.measures import FIGURES, Figures, Measure, answered_by_all, figures_of, ratios, read_measures
from loadtest.results.files import read
from loadtest.server import running_server
from loadtest.traffic.changing import override
from loadtest.traffic.plan import BadPlan, Plan
from loadtest.traffic.reading import read_plan
from loadtest.traffic.schedule import schedule

LOCUSTFILE = Path(__file__).parents[1] / "locustfile.py"
OURS = "loadtest"
_GRACE_S = 120.0  # for a tool to start, and to wait for its last answers

Tool: TypeAlias = Callable[["Traffic", Path], list[Measure]]


@dataclass(frozen=True, slots=True)
class Traffic:
    """What every tool is told to send, and where."""

    plan: str
    url: str
    models: tuple[str, ...]
    duration_s: float | None = None
    seed: int | None = None
    key: str = field(default="", repr=False)

    @property
    def resolved(self) -> Plan:
        return override(read_plan(self.plan), duration_s=self.duration_s, seed=self.seed)

    @property
    def options(self) -> list[str]:
        """As all of them spell it."""
        given = {"--models": ",".join(self.models), "--duration": self.duration_s, "--seed": self.seed}
        return [str(word) for name, value in given.items() if value is not None for word in (name, value)]


def by_us(traffic: Traffic, file: Path) -> list[Measure]:
    """`python -m loadtest run`."""
    _run(["-m", "loadtest", "run", traffic.plan, "--url", traffic.url, "--json", "--out", str(file)], traffic)
    return [
        Measure(
            record.number,
            record.outcome == "ok",
            record.took_s * 1000,
            record.ttft_s * 1000 if record.is_streaming and record.ttft_s is not None else None,
            record.output_tokens,
        )
        for record in read(file).records
    ]


def by_openai(traffic: Traffic, file: Path) -> list[Measure]:
    """The `openai` package, its calls in an asyncio loop."""
    where = ["--plan", traffic.plan, "--url", traffic.url, "--calls", str(file)]
    _run(["-m", "loadtest.outside.openai_loop", *where], traffic)
    return read_measures(file)


def by_locust(traffic: Traffic, file: Path) -> list[Measure]:
    """Locust without its page."""
    quiet = ["--headless", "--only-summary", "--loglevel", "ERROR", "--skip-log-setup"]
    where = ["--plan", traffic.plan, "--host", traffic.url, "--calls", str(file)]
    _run(["-m", "locust", "-f", str(LOCUSTFILE), *quiet, *where], traffic)
    return read_measures(file)


def installed() -> dict[str, Tool]:
    """Ours first."""
    others: dict[str, Tool] = {"locust": by_locust, "openai": by_openai}
    return {OURS: by_us} | {name: tool for name, tool in others.items() if find_spec(name) is not None}


def measure(traffic: Traffic, tools: Mapping[str, Tool], rounds: int, folder: Path) -> dict[str, list[list[Measure]]]:
    """Tool -> its rounds. In each round another tool begins."""
    measured: dict[str, list[list[Measure]]] = {name: [] for name in tools}
    order = list(tools)
    for number in range(rounds):
        for name in order[number % len(order) :] + order[: number % len(order)]:
            measured[name].append(tools[name](traffic, folder / f"{name}-{number}.jsonl"))
    return measured


def _run(words: Sequence[str], traffic: Traffic) -> None:
    limit_s = traffic.resolved.ends_s + traffic.resolved.timeout_s + _GRACE_S
    command = [sys.executable, *words, *traffic.options]
    with_key = os.environ | ({"ROOKERY_API_KEY": traffic.key} if traffic.key else {})  # no command line shows it
    done = subprocess.run(command, capture_output=True, text=True, timeout=limit_s, check=False, env=with_key)
    # Locust's exit code is 1 where any request failed; what was answered is compared all the same.
    if done.returncode not in (0, 1):
        raise SystemExit(f"{' '.join(words[:3])} ended with {done.returncode}: {done.stderr[-2000:]}")


@contextmanager
def _serving(url: str | None, models: str, num_models: int) -> Iterator[tuple[str, tuple[str, ...]]]:
    """The server's URL, and the models to ask for."""
    if url is not None:
        if not models:
            raise SystemExit("--url needs --models: ids of that server, with commas between")
        yield url, tuple(models.split(","))
        return
    with tempfile.TemporaryDirectory() as folder:
        ids = write_linked_models(Path(folder), num_models)
        with running_server(Path(folder), "bfloat16") as started:
            yield started, tuple(ids)


def _print(console: Console, figures: Mapping[str, Figures], num_calls: int, rounds: int) -> None:
    table = Table(title=f"{num_calls} calls, {rounds} rounds; in brackets the ratio to {OURS}", title_justify="left")
    for column in ("", "p50 ms", "p99 ms", "p50 TTFT ms", "p99 TTFT ms", "tokens/s of a stream"):
        table.add_column(column, justify="right" if column else "left")
    for name, each in figures.items():
        to_ours = ratios(figures[OURS], each)
        values = (f"{getattr(each, key):,.1f}" + f" ({to_ours[key]:.3f})" * (name != OURS) for key in FIGURES)
        table.add_row(name, *values)
    console.print(table)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m loadtest.outside", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--url", help="A server that runs; else one is started.")
    parser.add_argument("--key", default="", help="Its API key; else that of ROOKERY_API_KEY.")
    parser.add_argument("--models", default="", help="Its models to ask for, with commas between.")
    parser.add_argument("--plan", default="outside", help="The name of a plan, or a TOML file.")
    parser.add_argument("--duration", type=float, help="Seconds, instead of the plan's.")
    parser.add_argument("--seed", type=int, help="Instead of the plan's.")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    tools = installed()
    if len(tools) < 2:
        raise SystemExit("there is no other tool: pip install 'rookery[locust]', or pip install openai")
    try:
        plan = override(read_plan(options.plan), duration_s=options.duration, seed=options.seed)
    except BadPlan as exc:
        raise SystemExit(str(exc)) from exc
    with _serving(options.url, options.models, plan.num_models) as (url, models), tempfile.TemporaryDirectory() as out:
        traffic = Traffic(options.plan, url, models, options.duration, options.seed, options.key)
        counted = {call.number for call in schedule(plan, models) if call.at_s >= plan.warmup_s}
        tools[OURS](traffic, Path(out, "warm-up.jsonl"))
        measured = measure(traffic, tools, options.rounds, Path(out))
    numbers = answered_by_all(measured, counted)
    if not numbers:
        raise SystemExit(f"no call was answered whoever asked: {_answered(measured)}")
    figures = {name: figures_of(rounds, numbers) for name, rounds in measured.items()}
    _print(Console(), figures, len(numbers), options.rounds)
    print(json.dumps(_summary(figures, len(counted), len(numbers))))  # noqa: T201


def _answered(measured: Mapping[str, Sequence[Sequence[Measure]]]) -> str:
    return ", ".join(
        f"{name} {[sum(measure.ok for measure in each) for each in rounds]}" for name, rounds in measured.items()
    )


def _summary(figures: Mapping[str, Figures], num_calls: int, num_compared: int) -> dict[str, object]:
    to_ours = {name: ratios(figures[OURS], each) for name, each in figures.items() if name != OURS}
    worst = max(abs(ratio - 1) for each in to_ours.values() for ratio in each.values())
    return {
        "calls": num_calls,
        "compared": num_compared,
        "worst_difference_percent": round(100 * worst, 2),
        "ratios": {name: {key: round(ratio, 4) for key, ratio in each.items()} for name, each in to_ours.items()},
        "figures": {
            name: {key: round(value, 3) for key, value in asdict(each).items()} for name, each in figures.items()
        },
    }


if __name__ == "__main__":
    main()
