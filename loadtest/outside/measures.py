"""What a tool says became of each call, and how far two tools agree. It knows neither HTTP nor who measured."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import numpy as np


@dataclass(frozen=True, slots=True)
class Measure:
    """One call, in one round."""

    number: int
    ok: bool
    took_ms: float = 0.0
    ttft_ms: float | None = None  # of a stream
    tokens: int = 0


@dataclass(frozen=True, slots=True)
class Figures:
    """Of all calls that every tool saw answered in every round."""

    p50_ms: float
    p99_ms: float
    p50_ttft_ms: float
    p99_ttft_ms: float
    tokens_s: float  # of one stream, without its first token: what its reader sees


FIGURES = tuple(Figures.__slots__)


def write_measures(path: Path, measures: Sequence[Measure]) -> None:
    path.write_text("".join(json.dumps(asdict(measure)) + "\n" for measure in measures), encoding="utf-8")


def read_measures(path: Path) -> list[Measure]:
    return [Measure(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]


def answered_by_all(rounds: Mapping[str, Sequence[Sequence[Measure]]], counted: set[int]) -> set[int]:
    """The numbers, of those counted, of calls that were answered whoever measured."""
    every = [{measure.number for measure in each if measure.ok} for tool in rounds.values() for each in tool]
    return counted.intersection(*every)


def figures_of(rounds: Sequence[Sequence[Measure]], numbers: set[int]) -> Figures:
    """Percentiles over calls, each of them by its median over the rounds: one round's hiccup is none of the tool's."""
    took, ttft, rates = defaultdict[int, list[float]](list), defaultdict[int, list[float]](list), list[float]()
    for measure in (measure for each in rounds for measure in each if measure.number in numbers):
        took[measure.number].append(measure.took_ms)
        if measure.ttft_ms is not None:
            ttft[measure.number].append(measure.ttft_ms)
            if measure.tokens > 1 and measure.took_ms > measure.ttft_ms:
                rates.append((measure.tokens - 1) / (measure.took_ms - measure.ttft_ms) * 1000)
    p50, p99 = _percentiles(took)
    p50_ttft, p99_ttft = _percentiles(ttft)
    return Figures(p50, p99, p50_ttft, p99_ttft, median(rates) if rates else float("nan"))


def ratios(ours: Figures, theirs: Figures) -> dict[str, float]:
    """Theirs over ours."""
    return {name: getattr(theirs, name) / getattr(ours, name) for name in FIGURES}


def _percentiles(values: Mapping[int, Sequence[float]]) -> tuple[float, float]:
    if not values:
        return float("nan"), float("nan")
    p50, p99 = np.percentile([median(each) for each in values.values()], [50, 99])
    return float(p50), float(p99)
