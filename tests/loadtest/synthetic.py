"""Runs that were never made: a queue with Poisson arrivals, whose latencies depend on one another as real ones do."""

from __future__ import annotations

from typing import Any

import numpy as np

from loadtest.results.record import Header, Record, Run


def header(**changes: Any) -> Header:
    values: dict[str, Any] = {
        "plan": {"name": "steady", "seed": 1, "about": "a plan for tests"},
        "url": "http://127.0.0.1:8000",
        "target": "rookery",
        "command": "python -m loadtest run steady",
        "machine": "2 cores",
        "versions": {"rookery": "0.1.0"},
        "started_at": "2026-11-21T12:00:00Z",
        "warmup_s": 0.0,
        "duration_s": 10.0,
    }
    return Header(**(values | changes))


def record(number: int = 0, **changes: Any) -> Record:
    """A stream of 11 tokens that took a second, the first after 0.1 s, from a model that was there already."""
    at_s = changes.get("at_s", float(number))
    values: dict[str, Any] = {
        "number": number,
        "flow": "main",
        "model": "ada/bot",
        "at_s": at_s,
        "sent_s": at_s,
        "first_s": at_s + 0.1,
        "ended_s": at_s + 1.0,
        "outcome": "ok",
        "status": 200,
        "tier": "device",
        "prompt_tokens": 4,
        "output_tokens": 11,
    }
    return Record(**(values | changes))


def queue_run(
    seed: int,
    *,
    rate: float = 20.0,
    duration_s: float = 60.0,
    mean_service_s: float = 0.035,
    seconds_per_token: float = 0.01,
    arrivals_seed: int | None = None,
    gaps: bool = False,
    **changes: Any,
) -> Run:
    """One server, first come first served; exponential service times to the first token, then about 30 tokens."""
    arrivals = np.random.default_rng(seed if arrivals_seed is None else arrivals_seed)
    rng = np.random.default_rng((seed, 1))
    at = np.cumsum(arrivals.exponential(1 / rate, int(rate * duration_s * 1.3) + 20))
    at = at[at < duration_s]
    service = rng.exponential(mean_service_s, len(at))
    tokens = rng.integers(10, 50, len(at))
    pace = seconds_per_token * rng.uniform(0.8, 1.2, len(at))
    hits = rng.random(len(at)) < 0.8
    free, records = 0.0, []
    for number in range(len(at)):
        free = max(free, at[number]) + service[number]
        ended = free + pace[number] * (int(tokens[number]) - 1)
        records.append(
            record(
                number,
                at_s=float(at[number]),
                sent_s=float(at[number]) + 0.0005,
                first_s=float(free),
                ended_s=float(ended),
                output_tokens=int(tokens[number]),
                tier="device" if hits[number] else "disk",
                gaps_s=(float(pace[number]),) * (int(tokens[number]) - 1) if gaps else (),
            )
        )
    records.sort(key=lambda item: item.ended_s)
    return Run(header(duration_s=duration_s, **changes), tuple(records))
