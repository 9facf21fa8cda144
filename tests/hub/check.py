"""Everything that Rookery promises about Hugging Face Hubs, measured: `make hub-check`.

    python -m tests.hub.check [--minutes 10] [--mutations 10000] [--models 100000] [--quick]

Real services, the real Hub clients, and a fake Hub that is good or bad at will. One part after another, each with the
machine to itself; what they do goes to stderr. Ends with one JSON line, and status 0 if every promise is kept. A part
that fails leaves its figures null and the others as they are.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import httpx

from serve.store.revisions import Store
from tests.deployments.conftest import BASE, ROOKERY, import_tiny_model, start_service, stop_service
from tests.fakes.hub import fake_hub
from tests.fakes.models import write_tiny_gpt2
from tests.faults import mutate_weights
from tests.hub.clients import check_clients as call_clients
from tests.hub.clients import pipeline_word_for_word
from tests.hub.outage import outage, service_over

NUM_FETCHED = 5
KEY = "key-of-the-check"
ARCHIVE = Path(__file__).parents[2] / "deployments" / "archives" / "capt_barnacle.zip"
P50_RATIO_LIMIT = 1.05
RSS_RATIO_LIMIT = 1.10  # the same service twice differs by some per cent

Figures = Mapping[str, Any]

# What the line begins with, and when a figure is as promised.
PROMISES: Mapping[str, Callable[[Any], bool]] = {
    "pipeline_word_for_word": lambda is_so: is_so is True,
    "hub_client_calls_passed": lambda passed: passed is not None,  # all of `hub_client_calls`: `_is_kept`
    "mutations": lambda count: bool(count),
    "crashes": lambda count: count == 0,
    "wrong_loads": lambda count: count == 0,
    "pickle_ran": lambda has_run: has_run is not None and not has_run,
    "cached_path_requests": lambda count: count == 0,
    "outage_errors": lambda count: count == 0,
    "p50_ratio_100k": lambda ratio: ratio is not None and ratio <= P50_RATIO_LIMIT,
    "rss_ratio_100k": lambda ratio: ratio is not None and ratio <= RSS_RATIO_LIMIT,
}


def check_clients(folder: Path) -> Figures:
    """huggingface_hub, its command line and transformers, unmodified, with a bot that the service has trained."""
    base = write_tiny_gpt2(folder / "base", n_positions=1024)
    Store(folder / "data", embedded={}).import_folder(base, BASE)
    service = start_service(folder / "data", ROOKERY_API_KEYS=KEY)
    try:
        bot = _train(service.url)
        is_same = pipeline_word_for_word(service.url, bot)
        passed = call_clients(service.url, bot, token=KEY)
    finally:
        stop_service(service)
    return {
        "pipeline_word_for_word": is_same,
        "hub_client_calls_passed": sum(passed.values()),
        "hub_client_calls": len(passed),
        "hub_client_calls_failed": [name for name, is_well in passed.items() if not is_well],
    }


def check_weights(num_cases: int, seed: int) -> Figures:
    """Mutated weight files, and pickles that would do something."""

    def tell(done: int) -> None:
        if done % 1000 == 0:
            _say(f"{done} weight files")

    return _named("weights", mutate_weights.run(num_cases, seed, tell))


def check_cached_path(folder: Path, num_generations: int) -> Figures:
    """What the Hub is asked for models that were fetched before, by any of their names and after a restart."""
    with fake_hub() as hub:
        commits = {
            f"huggingtweets/m{i}": hub.add(f"huggingtweets/m{i}", write_tiny_gpt2(folder / f"m{i}", seed=i))
            for i in range(NUM_FETCHED)
        }
        import_tiny_model(folder / "data", BASE)
        names = [name for model_id, sha in commits.items() for name in _spellings(model_id, sha)]
        with service_over(hub, folder / "data") as service:
            for model_id in commits:
                _generate(service.url, model_id)
            fetching = len(hub.requests)
            for i in range(num_generations):
                _generate(service.url, names[i % len(names)])
            running = len(hub.requests) - fetching
        with service_over(hub, folder / "data") as service:
            for name in names:
                _generate(service.url, name)
        return {
            "cached_path_requests": len(hub.requests) - fetching,
            "cached_path_requests_after_restart": len(hub.requests) - fetching - running,
            "cached_path_generations": num_generations + len(names),
            "fetch_requests_per_model": fetching / NUM_FETCHED,
        }


def check_catalogue(num_models: int) -> Figures:
    """Latency and memory with a few models, and with very many."""
    sizes = ",".join(str(size) for size in sorted({10, min(1000, num_models), num_models}))
    command = [sys.executable, "-m", "loadtest.catalogue.bench", "--sizes", sizes]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    lines = done.stdout.strip().splitlines()
    assert done.returncode == 0 and lines, f"the benchmark ended with status {done.returncode}"
    return _named("catalogue", json.loads(lines[-1]))


def _named(part: str, figures: Figures) -> Figures:
    """What nobody promised goes under the name of its part."""
    return {name if name in PROMISES else f"{part}_{name}": value for name, value in figures.items()}


def _train(url: str) -> str:
    """A bot of one epoch, made as a user makes it; its id."""
    command = [*ROOKERY, "train", str(ARCHIVE), "--handle", "barney", "--epochs", "1", "--wait", "--json"]
    environment = {**os.environ, "ROOKERY_URL": url, "ROOKERY_API_KEY": KEY}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True, timeout=300)
    bot: str = json.loads(done.stdout)["fine_tuned_model"]
    return bot


def _spellings(model_id: str, sha: str) -> tuple[str, ...]:
    return model_id, f"{model_id}@{sha}", f"{model_id}@main", model_id.upper()


def _generate(url: str, model: str) -> None:
    body = {"model": model, "prompt": "My dream is", "max_tokens": 2}
    reply = httpx.post(f"{url}/v1/completions", json=body, timeout=60)
    assert reply.status_code == 200, f"{model}: {reply.status_code} {reply.text[:300]}"


def _run(name: str, part: Callable[[Path], Figures]) -> Figures:
    """The part's figures; of one that fails, none, and its reason goes to stderr."""
    _say(f"{name} ...")
    started = time.monotonic()
    try:
        with tempfile.TemporaryDirectory(prefix="rookery-hub-") as folder:
            figures = part(Path(folder))
    except Exception:
        traceback.print_exc()
        figures = {}
    _say(f"{name}: {time.monotonic() - started:.0f} s {json.dumps(figures)}")
    return figures


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _is_kept(figures: Figures) -> bool:
    has_passed = figures["hub_client_calls_passed"] == figures.get("hub_client_calls")
    return has_passed and all(is_kept(figures[name]) for name, is_kept in PROMISES.items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0, help="of outage")
    parser.add_argument("--mutations", type=int, default=10_000, help="of weight files")
    parser.add_argument("--models", type=int, default=100_000, help="in the catalogue")
    parser.add_argument("--generations", type=int, default=1000, help="with models that are here")
    parser.add_argument("--seed", type=int, default=0, help="of the mutations")
    parser.add_argument("--quick", action="store_true", help="a little of everything, in some three minutes")
    arguments = parser.parse_args()
    if arguments.quick:
        parser.set_defaults(minutes=0.3, mutations=200, models=1000, generations=100)
        arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # through all that cleans up
    parts: dict[str, Callable[[Path], Figures]] = {
        "clients": check_clients,
        "cached_path": lambda folder: check_cached_path(folder, arguments.generations),
        "weights": lambda _: check_weights(arguments.mutations, arguments.seed),
        "outage": lambda folder: outage(arguments.minutes, folder, _say),
        "catalogue": lambda _: check_catalogue(arguments.models),
    }
    figures: dict[str, Any] = dict.fromkeys(PROMISES)
    for name, part in parts.items():
        figures |= _run(name, part)
    print(json.dumps(figures))
    sys.exit(not _is_kept(figures))


if __name__ == "__main__":
    main()
