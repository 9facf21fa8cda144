"""What grows with the catalogue: `rookery up` over 10, 1,000 and 100,000 registered models.

    python -m loadtest.catalogue.bench [--sizes 10,1000,100000] [--rounds N] [--data FOLDER] [--json FILE]

A server runs on each data folder, all at the same time; every question is put to each of them in turn, so that what
else happens on the machine happens to all. Texts come from the same 8 models everywhere.

ready_s          from the start of the process to a first token
first_list_ms    the first list that was ever asked for: the index is made
first_by_age_s   the first list by age: all models are described, once for a data folder; the rest is measured after it
p50, p99         of one kind of request after another, in milliseconds
MB               of the gateways and of the generators, after all of it

Pages are as long as the smallest folder has them in its middle, so that all answers are. Ends with one line of JSON:
`p50_ratio_100k` is that of texts, and `p50_ratios` that of each kind, largest folder against smallest;
`rss_ratio_100k` is that of the memory of gateways and generators.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil  # type: ignore[import-untyped]
from rich.console import Console
from rich.table import Table

from loadtest.catalogue.folders import build_folder, model_ids, model_name
from loadtest.server import running_server

SIZES = (10, 1_000, 100_000)
NUM_ASKED = 8  # models that write texts
PARTS = ("gateway", "generator")
_WARM_ROUNDS = 10
_PAGE = 4


@dataclass(frozen=True, slots=True)
class Question:
    """One kind of request, and the status of its answer. `body`: of a POST."""

    name: str
    path: str
    body: Mapping[str, Any] | None = None
    status: int = 200


@dataclass
class Server:
    """A running service over `num_models`, and what was measured of it."""

    num_models: int
    client: httpx.Client
    data: Path
    ready_s: float
    first_list_s: float = 0.0
    first_by_age_s: float = 0.0
    seconds: dict[str, list[float]] = field(default_factory=dict)
    rss: dict[str, int] = field(default_factory=dict)

    def ask(self, question: Question) -> float:
        """Seconds to the whole answer."""
        started = time.perf_counter()
        if question.body is None:
            answer = self.client.get(question.path)
        else:
            answer = self.client.post(question.path, json=question.body)
        seconds = time.perf_counter() - started
        if answer.status_code != question.status:
            raise SystemExit(f"{question.name}: {answer.status_code} {answer.text[:200]}")
        return seconds

    def p50_ms(self, name: str) -> float:
        return 1000 * statistics.median(self.seconds[name])

    def p99_ms(self, name: str) -> float:
        return 1000 * statistics.quantiles(self.seconds[name], n=100)[98]


def compare(
    sizes: Sequence[int] = SIZES, *, num_rounds: int = 200, data: Path | None = None, seed: int = 0
) -> dict[str, Any]:
    """Builds the folders, runs the servers, and returns what the last line says. `data`: where folders are kept."""
    console = Console(stderr=True)
    with ExitStack() as stack:
        root = data or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="catalogue-")))
        servers = [stack.enter_context(_serve(root, size, console)) for size in sizes]
        for server in servers:
            first_page = Question("list", f"/v1/models?limit={_PAGE}")
            server.first_list_s = server.ask(first_page)
        for server in servers:  # or one would still be at it, in the background, while all are measured
            server.first_by_age_s = server.ask(Question("by age", "/api/models?sort=lastModified&limit=1"))
        _take_turns(servers, num_rounds, random.Random(seed))
        for server in servers:
            server.rss = {part: _rss(server.data, part) for part in PARTS}
    _show(servers, console)
    return _result(servers)


@contextmanager
def _serve(root: Path, num_models: int, console: Console) -> Iterator[Server]:
    data = root / str(num_models)
    if not data.is_dir():
        started = time.perf_counter()
        build_folder(data, num_models)
        console.print(f"{num_models:,} models registered in {time.perf_counter() - started:.1f} s")
    for made in (data / "models").glob(".index*"):
        made.unlink()
    started = time.perf_counter()
    with running_server(data, "bfloat16") as url, httpx.Client(base_url=url, timeout=300) as client:
        yield Server(num_models, client, data, time.perf_counter() - started)


def _take_turns(servers: Sequence[Server], num_rounds: int, chance: random.Random) -> None:
    smallest = min(server.num_models for server in servers)
    asked = [model_id for model_id, _ in zip(model_ids(smallest), range(NUM_ASKED), strict=False)]
    for number in range(-_WARM_ROUNDS, num_rounds):
        model_id = asked[number % len(asked)]
        for name in _questions(model_id, 1):
            order = list(servers)
            chance.shuffle(order)
            for server in order:
                seconds = server.ask(_questions(model_id, server.num_models)[name])
                if number >= 0:
                    server.seconds.setdefault(name, []).append(seconds)


def _questions(model_id: str, num_models: int) -> dict[str, Question]:
    """By name. All servers answer the same, but for the page in the middle."""
    listing, middle = f"/v1/models?limit={_PAGE}", _middle(num_models)
    questions = (
        Question("text", "/v1/completions", {"model": model_id, "prompt": "My dream is", "max_tokens": 8, "seed": 1}),
        Question("first page", listing),
        Question("middle page", f"{listing}&after={middle}"),
        Question("rare search", f"{listing}&q={model_name(3)[-6:]}"),
        Question("common search", f"{listing}&q=huggingtweets"),
        Question("model", f"/v1/models/{model_id}"),
        Question("other spelling", f"/v1/models/{model_id.upper()}"),
        Question("unknown", "/v1/models/huggingtweets/nobody", status=404),
    )
    return {question.name: question for question in questions}


_MIDDLES: dict[int, str] = {}


def _middle(num_models: int) -> str:
    """A model with as many before it as behind it."""
    if num_models not in _MIDDLES:
        ids = sorted(model_ids(num_models))
        _MIDDLES[num_models] = ids[len(ids) // 2]
    return _MIDDLES[num_models]


def _rss(data: Path, part: str) -> int:
    """Of the replicas of one part of the service over `data`, together."""
    total = 0
    for process in psutil.process_iter(["cmdline"]):
        title = " ".join(process.info["cmdline"] or ()).lower()
        try:
            is_replica = title.startswith("ray::servereplica") and part in title
            if is_replica and process.environ().get("ROOKERY_DATA") == str(data.absolute()):
                total += process.memory_info().rss
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    if not total:
        raise SystemExit(f"no process of a {part} over {data} was found")
    return total


def _show(servers: Sequence[Server], console: Console) -> None:
    first = servers[0]
    table = Table("", *(f"{server.num_models:,} models" for server in servers), title="Catalogue")
    table.add_row("ready, s", *(f"{server.ready_s:.1f}" for server in servers))
    table.add_row("first list ever, ms", *(f"{1000 * server.first_list_s:.0f}" for server in servers))
    table.add_row("first list by age, s", *(f"{server.first_by_age_s:.2f}" for server in servers))
    for name in first.seconds:
        cells = (
            f"{server.p50_ms(name):.2f} / {server.p99_ms(name):.2f}  ({server.p50_ms(name) / first.p50_ms(name):.3f})"
            for server in servers
        )
        table.add_row(f"{name}, p50 / p99 ms", *cells)
    for part in PARTS:
        cells = (f"{server.rss[part] / 2**20:.0f}  ({server.rss[part] / first.rss[part]:.3f})" for server in servers)
        table.add_row(f"{part}, MB", *cells)
    console.print(table)


def _result(servers: Sequence[Server]) -> dict[str, Any]:
    first, last = servers[0], servers[-1]
    ratios = {name: round(last.p50_ms(name) / first.p50_ms(name), 3) for name in first.seconds}
    return {
        "p50_ratio_100k": ratios["text"],
        "rss_ratio_100k": round(sum(last.rss.values()) / sum(first.rss.values()), 3),
        "p50_ratios": ratios,
        "rss_ratios": {part: round(last.rss[part] / first.rss[part], 3) for part in PARTS},
        "sizes": [server.num_models for server in servers],
        "ready_s": [round(server.ready_s, 1) for server in servers],
        "first_list_ms": [round(1000 * server.first_list_s, 1) for server in servers],
        "first_by_age_s": [round(server.first_by_age_s, 2) for server in servers],
        "p50_ms": {name: [round(server.p50_ms(name), 2) for server in servers] for name in first.seconds},
    }


def main() -> None:
    """Prints the table, and one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default=",".join(map(str, SIZES)), help="models in each folder, smallest first")
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--data", type=Path, help="where the folders are, or are made and kept")
    parser.add_argument("--json", type=Path, help="also write the last line there")
    options = parser.parse_args()
    sizes = [int(size) for size in options.sizes.split(",")]
    line = json.dumps(compare(sizes, num_rounds=options.rounds, data=options.data))
    if options.json:
        options.json.write_text(line + "\n", encoding="utf-8")
    print(line)  # noqa: T201


if __name__ == "__main__":
    main()
