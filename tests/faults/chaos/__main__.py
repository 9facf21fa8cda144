"""Faults at random under load, then one checker: `make chaos MINUTES=20 SEED=1`.

    python -m tests.faults.chaos [--minutes 20] [--seed 1] [--only "kill -9 generator,Hub away"]

Two generators, two gateways and a trainer, over a Hub of its own. Streams and whole answers are asked for all the time,
models are replaced and deleted, jobs are trained; every few seconds one of `STRIKES` happens. Then all is put right,
every job ends, and `tests.faults.invariants` looks at what is left. Ends with one JSON line, and status 0 if all held.

- `lost`: requests that were neither answered whole, nor refused by a 4xx or by a 503 with Retry-After, nor, a stream
  that had begun, told so by an error event. `streams_cut`, of these: streams that ended without a word with the gateway
  that carried them, which was killed. They are the only ones that may be; the rest is to be 0.
- `raw_500`: answers from 500 on that do not say when to come again.
- `streams_resumed`: that went on on another generator. `streams_differing`: that were whole and had another text than
  the same request gets from a service that is left alone.
- `jobs_lost`: accepted, and neither succeeded nor cancelled; `disk_full` is an honest end. `jobs_doubled`: that ended
  twice, or made two models. `leaked`: what is left of processes, leases, slots, locks, folders and files.
- `broken`: a sentence for all that is not as it should be, also of models and of deletions.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import httpx

from serve.database.connection import Database
from serve.settings import Settings
from serve.store.revisions import Store
from tests.deployments.conftest import stop_service, wait_until
from tests.faults.chaos.people import Patient, Trainers
from tests.faults.chaos.strikes import STRIKES
from tests.faults.chaos.world import AWAY, CHANGING, STABLE, World, world
from tests.faults.invariants import (
    check_counts,
    check_gone,
    check_idle,
    check_jobs,
    check_leftovers,
    check_models,
    cut_by,
    log_lines,
)
from tests.faults.traffic import Outcome, Traffic, differing, make_asks, undisturbed, verdict_of

_BETWEEN_S = (1.0, 8.0)  # two strikes
_WHOLE_S, _DRAIN_S = 180.0, 600.0  # that the service has to come back, and jobs to end


def _say(line: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {line}", file=sys.stderr, flush=True)


def run(minutes: float, seed: int, root: Path, only: list[str]) -> dict[str, Any]:
    """The figures; `broken` and `lost` tell whether all held."""
    started = time.monotonic()
    with world(root, seed) as broken_world:
        stable = make_asks(STABLE, 60, seed=seed, num_tokens=(60, 150))
        others = make_asks([*CHANGING, *AWAY], 400, seed=seed, num_tokens=(5, 20))
        texts = undisturbed(broken_world.url, stable)
        _say("the texts of a service that is left alone are there")
        compared = Traffic(broken_world.url, stable, unary=2, streams=3, pause_s=0.2)
        moving = Traffic(broken_world.url, others, unary=1, streams=1, pause_s=0.5)
        trainers, patient = Trainers(broken_world.url, seed), Patient(broken_world.url)
        with compared, moving, patient, trainers:
            faults, skipped = _strike(broken_world, 60 * minutes, only)
            broken_world.recover()
        _say("all is put right; waiting for the service and its jobs")
        wait_until(broken_world.is_whole, _WHOLE_S, poll_s=1.0)
        wait_until(lambda: trainers.num_open() == 0, _DRAIN_S, poll_s=2.0)
        outcomes = [*compared.outcomes, *moving.outcomes]
        verdict = verdict_of(outcomes)
        other_texts = differing(compared.outcomes, texts)
        checked = _check(broken_world, trainers)
    streams, resumed = {one.request_id for one in outcomes if one.is_stream}, _resumed(root)
    for one in other_texts:
        _say(f"another text ({'' if one.request_id in resumed else 'not '}resumed): {_difference(one, texts[one.ask])}")
    cut = cut_by(outcomes, broken_world.gateway_kills_s)
    return {
        "requests": verdict.requests,
        "lost": verdict.lost,
        "raw_500": verdict.raw_500,
        "streams": verdict.streams,
        "streams_resumed": len(streams & resumed),
        "streams_differing": sum(one.is_stream for one in other_texts),
        "jobs": len(trainers.accepted),
        **{name: len(sentences) for name, sentences in checked.items() if name != "broken"},
        "streams_cut": len(cut),
        "streams_told": verdict.streams_told,
        "whole_differing": sum(not one.is_stream for one in other_texts),
        "refused": verdict.refused,
        "longest_gap_s": round(verdict.longest_gap_s, 1),
        "slowest_s": round(verdict.slowest_s, 1),
        "openai_requests": patient.asked,
        "openai_failed": patient.failed.total(),
        "openai_failures": dict(patient.failed),
        "ended": dict(verdict.errors),
        "faults": dict(faults),
        "skipped": sorted(skipped),
        "seed": seed,
        "minutes": minutes,
        "seconds": round(time.monotonic() - started),
        "broken": [sentence for sentences in checked.values() for sentence in sentences],
    }


def _strike(broken_world: World, duration_s: float, only: list[str]) -> tuple[Counter[str], set[str]]:
    """How often each was done, and what never could be."""
    done, tried = Counter[str](), Counter[str]()
    until = time.monotonic() + duration_s
    kinds = {kind: weight for kind, (_, weight) in STRIKES.items() if not only or kind in only}
    draw = random.Random(broken_world.random.random())
    while time.monotonic() < until:
        kind = draw.choices(list(kinds), list(kinds.values()))[0]
        tried[kind] += 1
        has_struck = STRIKES[kind][0](broken_world)
        done[kind] += has_struck
        _say(kind if has_struck else f"{kind}: not now")
        time.sleep(draw.uniform(*_BETWEEN_S))
    return +done, {kind for kind in tried if not done[kind]}


def _check(broken_world: World, trainers: Trainers) -> dict[str, list[str]]:
    """By the name of their count, what does not hold. Ends the service."""
    data, url = broken_world.data, broken_world.url
    gone = set(broken_world.gone.values()) - broken_world.present.keys()
    idle = check_idle(httpx.get(f"{url}/v1/replicas", timeout=60).json()["data"], gone)
    counts = check_counts(
        httpx.get(f"{url}/metrics", timeout=60).text, broken_world.logs, slack=broken_world.num_killed
    )
    left = [f"still running: {title}" for title in stop_service(broken_world.service)]
    _say("the service has ended; looking at what is left")
    database = Database(Settings(data=data).sql_url)
    try:
        store = Store(data, embedded={})  # opening it sweeps what the dead left
        lost, doubled = check_jobs(database, store, trainers.accepted, may_fail=("disk_full",))
        left += check_leftovers(data, database)
    finally:
        database.close()
    return {
        "jobs_lost": lost,
        "jobs_doubled": doubled,
        "leaked": left + idle,
        "models_broken": check_models(store, broken_world.fetched),
        "undeleted": check_gone([data], broken_world.gone),
        "miscounted": counts,
        "broken": broken_world.broken,
    }


def _difference(outcome: Outcome, texts: Mapping[int, str]) -> str:
    """Where it begins."""
    pairs = [(text, outcome.texts.get(index, "")) for index, text in texts.items()]
    lengths = [f"{len(os.path.commonprefix(pair))} of {len(pair[0])} characters the same" for pair in pairs]
    return f"{outcome.ask.model}, temperature {outcome.ask.temperature:g}, {', '.join(lengths)}"


def _resumed(root: Path) -> set[str]:
    """Ids of the requests of which there was a part when another generator went on."""
    lines = log_lines(sorted(root.glob("log.jsonl*")))
    return {line["request_id"] for line in lines if line["event"] == "generation_resumed" and line["tokens"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--seed", type=int, default=1, help="of what happens; not of when a machine gets to it")
    parser.add_argument("--only", default="", help="kinds of faults with commas between them")
    arguments = parser.parse_args()
    only = [kind for kind in arguments.only.split(",") if kind]
    if unknown := set(only) - STRIKES.keys():
        parser.error(f"there is no fault {', '.join(sorted(unknown))}; there are {', '.join(STRIKES)}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # through all that cleans up
    with tempfile.TemporaryDirectory(prefix="rookery-chaos-", ignore_cleanup_errors=True) as folder:
        figures = run(arguments.minutes, arguments.seed, Path(folder), only)
    print(json.dumps(figures))
    sys.exit(bool(figures["broken"] or figures["raw_500"] or figures["lost"] > figures["streams_cut"]))


if __name__ == "__main__":
    main()
