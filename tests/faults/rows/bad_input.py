"""B1 to B6, B11 and B14: bad requests at a live service, by raw sockets through HAProxy.

Each row is a share of what `python -m tests.faults.fuzz` sends. B13, of keys, has rows of its own.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.faults.fuzz.__main__ import FAULTS, fuzz_live, is_clean, service_to_fuzz
from tests.faults.row import Measured, row

CASES = {"B1": 20_000, "B2": 16_000, "B3": 8_000, "B4": 12_000, "B5": 12_000, "B6": 8_000, "B11": 6_000, "B14": 12_000}
EXPECTED = "4xx of ≤ 4 KB in ≤ 100 ms; 0 5xx, 0 hangs, 0 echoes"


def _fuzzed(family: str, folder: Path, share: float, *, with_loris: bool = False) -> Measured:
    num_cases = max(50, round(CASES[family] * share))
    with service_to_fuzz(folder) as service:
        figures = fuzz_live(service, num_cases, seed=1, kept=folder, families=(family,), with_loris=with_loris)
    return Measured(_told(figures), is_clean(figures), figures)


def _told(figures: dict[str, Any]) -> str:
    wrong = [f"{figures[name]} {name}" for name in FAULTS if figures[name]]
    found = ", ".join(wrong) or "0 5xx, 0 hangs, 0 echoes, 0 slow"
    refused, healthz = figures["refused_ms"], figures["healthz_ms"]
    return (
        f"{figures['cases']:,} cases: {found}; refused within {refused['p99']:g} ms "
        f"(p99; /healthz {healthz['p99']:g}), at most {figures['max_bytes']} bytes"
    )


@row(
    "B1",
    did="20,000 requests with ids that no model has, in paths, queries, bodies, forms and headers",
    expected=EXPECTED,
    minutes=4,
)
def impossible_ids(folder: Path, share: float) -> Measured:
    return _fuzzed("B1", folder, share)


@row(
    "B2",
    did="16,000 bodies that are no JSON, or say strange things: depth, NaN, surrogates, numbers",
    expected=EXPECTED,
    minutes=4,
)
def bad_json(folder: Path, share: float) -> Measured:
    return _fuzzed("B2", folder, share)


@row(
    "B3",
    did="8,000 requests of too many or too long headers, addresses, parts, fields, announced bodies",
    expected=EXPECTED,
    minutes=3,
)
def sizes(folder: Path, share: float) -> Measured:
    return _fuzzed("B3", folder, share)


@row(
    "B4",
    did="12,000 bodies of another type, charset, coding or boundary; Expect, Accept, method overrides",
    expected=EXPECTED,
    minutes=3,
)
def content_types(folder: Path, share: float) -> Measured:
    return _fuzzed("B4", folder, share)


@row("B5", did="12,000 texts with one parameter out of its range or of another type", expected=EXPECTED, minutes=3)
def sampling_parameters(folder: Path, share: float) -> Measured:
    return _fuzzed("B5", folder, share)


@row(
    "B6",
    did="8,000 prompts: empty, too long, too many, ids out of the vocabulary, surrogates, marks",
    expected=EXPECTED,
    minutes=3,
)
def prompts(folder: Path, share: float) -> Measured:
    return _fuzzed("B6", folder, share)


@row("B11", did="6,000 uploads whose names would break out of a page, a header or a card", expected=EXPECTED, minutes=3)
def names(folder: Path, share: float) -> Measured:
    return _fuzzed("B11", folder, share)


@row(
    "B14",
    did="12,000 broken or abused requests: framing, lines, ranges, pipelines, cut off, byte by byte",
    expected=EXPECTED,
    minutes=4,
)
def http_level(folder: Path, share: float) -> Measured:
    return _fuzzed("B14", folder, share, with_loris=True)
