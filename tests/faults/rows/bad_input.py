"""B1 to B6, B11 and B14: bad requests at a live service, by raw sockets through HAProxy.

Each row is a share of what `python -m tests.faults.fuzz` sends. B13, of keys, has rows of its own.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from tests.faults.fuzz.__main__ import FAULTS, fuzz_live, is_clean, service_to_fuzz
from tests.faults.row import Measured, row

FAMILIES = (  # id, cases at the full share, of what, minutes
    ("B1", 20_000, "requests with ids that no model has, in paths, queries, bodies, forms and headers", 4),
    ("B2", 16_000, "bodies that are no JSON, or say strange things: depth, NaN, surrogates, numbers", 4),
    ("B3", 8_000, "requests of too many or too long headers, addresses, parts, fields, announced bodies", 3),
    ("B4", 12_000, "bodies of another type, charset, coding or boundary; Expect, Accept, method overrides", 3),
    ("B5", 12_000, "texts with one parameter out of its range or of another type", 3),
    ("B6", 8_000, "prompts: empty, too long, too many, ids out of the vocabulary, surrogates, marks", 3),
    ("B11", 6_000, "uploads whose names would break out of a page, a header or a card", 3),
    ("B14", 12_000, "broken or abused requests: framing, lines, ranges, pipelines, cut off, byte by byte", 4),
)


def _fuzzed(family: str, full: int, folder: Path, share: float) -> Measured:
    num_cases = max(50, round(full * share))
    with service_to_fuzz(folder) as service:
        figures = fuzz_live(service, num_cases, seed=1, kept=folder, families=(family,), with_loris=family == "B14")
    return Measured(_told(figures), is_clean(figures), figures)


def _told(figures: dict[str, Any]) -> str:
    wrong = [f"{figures[name]} {name}" for name in FAULTS if figures[name]]
    found = ", ".join(wrong) or "0 5xx, 0 hangs, 0 echoes, 0 slow"
    refused, healthz = figures["refused_ms"], figures["healthz_ms"]
    return (
        f"{figures['cases']:,} cases: {found}; refused within {refused['p99']:g} ms "
        f"(p99; /healthz {healthz['p99']:g}), at most {figures['max_bytes']} bytes"
    )


for _family, _cases, _what, _minutes in FAMILIES:
    row(
        _family,
        did=f"{_cases:,} {_what}",
        expected="4xx of ≤ 4 KB in ≤ 100 ms; 0 5xx, 0 hangs, 0 echoes",
        minutes=_minutes,
    )(partial(_fuzzed, _family, _cases))
