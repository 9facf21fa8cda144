"""Two runs side by side: B over A for each figure, with 95 % intervals where a figure has one.

Runs of the same plan and seed have the same arrivals, so slices of the same moments are drawn together from both, and
what the arrivals alone made differ cancels; runs of different plans are drawn apart. It does not run anything.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from loadtest.results.bootstrap import Estimate, Percentile, Ratio, block_length, draw, interval
from loadtest.results.columns import Bools, Columns, Floats, Ints, arrived, first_tokens
from loadtest.results.record import Header, Run
from loadtest.results.summary import Summary, plain, summarize

RESAMPLES = 1000
_SLICES = 30  # at least so many, and none longer than a second, but for
_MOST_SLICES = 3_600  # which with all resamples take 100 MB
_PERCENTS = (50, 90, 99)
_HIGHER_IS_BETTER = {
    "answered", "requests_s", "tokens_s", "goodput_tokens_s", "tweets", "tweets_s", "hit_rate", "jobs_done",
}  # fmt: skip
_NEITHER = {"requests", "cancelled", "offered_s", "prompt_tokens", "output_tokens", "jobs", "window_s"}
Better = Literal["A", "B", ""]


@dataclass(frozen=True, slots=True)
class Row:
    """One figure. `ratio`: B over A; None where A has none or 0. `low`, `high`: None where there is no interval."""

    name: str
    a: float | None
    b: float | None
    ratio: float | None
    low: float | None
    high: float | None

    @property
    def is_shown(self) -> bool:
        """The interval does not hold 1."""
        return self.low is not None and self.high is not None and not (self.low <= 1 <= self.high)

    @property
    def better(self) -> Better:
        if not self.is_shown or self.ratio is None or self.name in _NEITHER:
            return ""
        return "B" if (self.ratio > 1) == (self.name in _HIGHER_IS_BETTER) else "A"

    @property
    def verdict(self) -> str:
        if self.ratio is None:
            return "" if not self.a and not self.b else "no ratio"
        if self.low is None or self.high is None:
            return "no interval"
        if not self.is_shown:
            return "no difference shown"
        side = "higher" if self.ratio > 1 else "lower"
        return f"B {side}, {self.better} better" if self.better else f"B {side}"


@dataclass(frozen=True, slots=True)
class Comparison:
    """`warnings`: what else differs between the two runs than what was to be compared."""

    name_a: str
    name_b: str
    rows: tuple[Row, ...]
    warnings: tuple[str, ...]
    slice_s: float
    block_s: float
    is_paired: bool

    def to_json(self) -> dict[str, Any]:
        """Ratios by figure; a bound that is infinite is None."""
        return {
            "a": self.name_a,
            "b": self.name_b,
            "warnings": list(self.warnings),
            "slice_s": self.slice_s,
            "block_s": self.block_s,
            "paired": self.is_paired,
            "figures": {row.name: _plain(row) for row in self.rows},
        }


def compare(
    a: Run,
    b: Run,
    *,
    prices: tuple[float, float] | None = None,
    names: tuple[str, str] = ("A", "B"),
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Comparison:
    """B against A. `prices`: dollars an hour of what served each. The same seed gives the same intervals."""
    sums = [summarize(run, price) for run, price in zip((a, b), prices or (None, None), strict=True)]
    windows = [max(total.window_s, 1e-3) for total in sums]
    slice_s = max(min(1.0, min(windows) / _SLICES), max(windows) / _MOST_SLICES)
    sides = [_Side(run, total, slice_s) for run, total in zip((a, b), sums, strict=True)]
    length = min(max(side.block for side in sides), *(max(1, side.num_slices // 5) for side in sides))
    is_paired = _arrivals(a.header) == _arrivals(b.header) and sides[0].num_slices == sides[1].num_slices
    rng = np.random.default_rng(seed)
    first = draw(sides[0].num_slices, length, resamples, rng)
    weights = (first, first if is_paired else draw(sides[1].num_slices, length, resamples, rng))
    num_blocks = min(side.num_slices // length for side in sides)
    rows = _rows(sums, sides, weights, num_blocks)
    return Comparison(*names, tuple(rows), tuple(_warnings((a, b), sums)), slice_s, slice_s * length, is_paired)


class _Side:
    """One run, cut into slices by the moments at which its requests were due."""

    def __init__(self, run: Run, total: Summary, slice_s: float) -> None:
        begin, end = run.window_s
        columns = Columns.of([record for record in run.records if record.kind == "generate"])
        self.num_slices = max(1, round((end - begin) / slice_s))
        self._edges = np.linspace(begin, max(end, begin + 1e-3), self.num_slices + 1)
        self._all = columns
        self._counted = columns[columns.at >= begin]
        self._price = total.usd_per_1000_tweets
        self.block = block_length(self._latencies())

    def estimates(self) -> Iterator[tuple[str, Estimate]]:
        counted, ok = self._counted, self._counted.ok
        told = ok & ~counted.tier.where("")
        yield "error_share", self._share(counted.is_error, np.ones(len(counted), dtype=np.bool_))
        yield "refused_share", self._share(counted.outcome.where("refused"), np.ones(len(counted), dtype=np.bool_))
        yield "hit_rate", self._share(counted.tier.where("device") & told, told)
        yield "cold_share", self._share(~counted.tier.where("device") & told, told)
        for suffix, mask, values in (
            ("ttft_ms", first_tokens(counted), counted.ttft),
            ("ms", ok, counted.took),
            ("itl_ms", ok, counted.time_per_token),
            ("lag_ms", np.ones(len(counted), dtype=np.bool_), counted.lag),
        ):
            known = mask & ~np.isnan(values)
            slices, found = self._slice_of(counted.at[known]), values[known]
            yield f"mean_{suffix}", Ratio(self._per_slice(slices, found), self._per_slice(slices, np.ones(len(found))))
            for percent in _PERCENTS:
                yield f"p{percent}_{suffix}", Percentile(found, slices, percent / 100)
        yield from self._rates()

    def _rates(self) -> Iterator[tuple[str, Estimate]]:
        columns, edges = self._all, self._edges
        seconds = np.diff(edges)
        ok, left = columns[columns.ok], columns[columns.outcome.where("cancelled")]
        good = np.diff(arrived(ok, edges))
        tweets = np.histogram(ok.ended, edges, weights=ok.choices)[0]
        yield "offered_s", Ratio(np.histogram(columns.at, edges)[0].astype(np.float64), seconds)
        yield "requests_s", Ratio(np.histogram(ok.ended, edges)[0].astype(np.float64), seconds)
        yield "tokens_s", Ratio(good + np.diff(arrived(left, edges)), seconds)
        yield "goodput_tokens_s", Ratio(good, seconds)
        yield "tweets_s", Ratio(tweets, seconds)
        if self._price is not None:
            yield "usd_per_1000_tweets", Ratio(seconds * self._price * tweets.sum() / seconds.sum(), tweets)

    def _latencies(self) -> Floats:
        """The mean of each slice, NaN where nothing was answered: what waits in the same queue shows in it."""
        answered = self._counted[self._counted.ok]
        slices = self._slice_of(answered.at)
        with np.errstate(invalid="ignore"):
            return self._per_slice(slices, answered.took) / self._per_slice(slices, np.ones(len(answered)))

    def _slice_of(self, at: Floats) -> Ints:
        return np.clip(np.searchsorted(self._edges, at, side="right") - 1, 0, self.num_slices - 1)

    def _per_slice(self, slices: Ints, amounts: Floats) -> Floats:
        return np.bincount(slices, amounts, minlength=self.num_slices).astype(np.float64)

    def _share(self, part: Bools, whole: Bools) -> Ratio:
        slices = self._slice_of(self._counted.at)
        return Ratio(self._per_slice(slices, part.astype(float)), self._per_slice(slices, whole.astype(float)))


def _rows(sums: list[Summary], sides: list[_Side], weights: tuple[Ints, Ints], num_blocks: int) -> Iterator[Row]:
    figures = [plain(total) for total in sums]
    estimates = [dict(side.estimates()) for side in sides]
    for name, a in figures[0].items():
        b = figures[1][name]
        if not all(isinstance(value, (int, float, type(None))) for value in (a, b)) or (a is None and b is None):
            continue
        ratio = b / a if a and b is not None else None
        low = high = None
        if ratio is not None and all(name in side for side in estimates):
            bounds = interval(ratio, _resampled(name, estimates, weights), num_blocks)
            low, high = bounds or (None, None)
        yield Row(name, a, b, ratio, low, high)


def _resampled(name: str, estimates: list[dict[str, Estimate]], weights: tuple[Ints, Ints]) -> Floats:
    below, above = (side[name].at(weight) for side, weight in zip(estimates, weights, strict=True))
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(above / below, dtype=np.float64)


def _plain(row: Row) -> dict[str, Any]:
    def number(value: float | None) -> float | None:
        return None if value is None or not math.isfinite(value) else float(f"{value:.6g}")

    return {
        "a": number(row.a),
        "b": number(row.b),
        "ratio": number(row.ratio),
        "low": number(row.low),
        "high": number(row.high),
        "verdict": row.verdict,
        "better": row.better,
    }


def _arrivals(header: Header) -> tuple[Any, ...]:
    """What makes the requests of a run and when they are due."""
    return dict(header.plan), header.warmup_s, header.duration_s


def _warnings(runs: tuple[Run, Run], sums: list[Summary]) -> Iterator[str]:
    a, b = runs
    changed = [name for name in _changed(a.header.plan, b.header.plan) if name != "seed"]
    if changed:
        yield f"The plans differ: {', '.join(changed)}."
    for name, of_a, of_b in (
        ("seeds", a.header.plan.get("seed"), b.header.plan.get("seed")),
        ("durations", (a.header.warmup_s, a.header.duration_s), (b.header.warmup_s, b.header.duration_s)),
        ("machines", a.header.machine, b.header.machine),
        ("targets", a.header.target, b.header.target),
    ):
        if of_a != of_b:
            yield f"The {name} differ: {of_a} and {of_b}."
    if versions := _changed(a.header.versions, b.header.versions):
        yield f"The versions differ: {', '.join(versions)}."
    for letter, total in zip("AB", sums, strict=True):
        yield from (f"{letter}: {note}" for note in total.notes)


def _changed(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    return [name for name in dict.fromkeys((*a, *b)) if a.get(name) != b.get(name)]
