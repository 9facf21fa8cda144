"""What the runs of several servers say side by side: a table, Markdown, and one object of plain numbers a server.

It knows runs, not the servers. Latencies and shares are of the light runs, over all rounds together; tokens a second
and what is called busy are of the saturating ones, tokens a second as the median of rounds. A request that was not
answered is in all of them, as slow as its timeout: who drops requests does not look faster for it. Of fewer than 100
requests there is no 99th percentile, and so no ratio of one; the slowest is told instead. A ratio to Rookery is always
such that above 1 Rookery is better.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from rich.table import Table

from loadtest.results.record import Record, Run
from loadtest.results.summary import ENOUGH_FOR_P99, summarize

OURS = "rookery"
# Of one number of models; in the order in which they are told.
VALUES = (
    "tokens_s", "requests",
    "p50_ttft_ms", "p90_ttft_ms", "p99_ttft_ms", "slowest_ttft_ms", "p50_ms", "p90_ms", "p99_ms", "slowest_ms",
    "busy_requests", "busy_p50_ttft_ms", "busy_p90_ms", "busy_p99_ms", "cold_share", "memory_mib",
)  # fmt: skip
_MORE_IS_BETTER = ("tokens_s",)
_COMPARED = (
    "tokens_s", "p50_ttft_ms", "p90_ttft_ms", "p99_ttft_ms", "p50_ms", "p90_ms", "p99_ms", "busy_p90_ms", "busy_p99_ms",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Measured:
    """One turn of a server with so many models."""

    count: int
    light: Run
    busy: Run
    num_loads: int  # during the light run
    memory_bytes: int


@dataclass(slots=True)
class Standing:
    """What is known of one server."""

    name: str
    about: str
    keeps_limit: bool = True
    turns: list[Measured] = field(default_factory=list)
    starts_s: list[float] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)  # why something is missing

    def fail(self, reason: str) -> None:
        if reason not in self.reasons:
            self.reasons.append(reason)

    def values(self, count: int) -> dict[str, float | None]:
        """`VALUES` with `count` models; None where there was no turn with so many, or no answer."""
        turns = [turn for turn in self.turns if turn.count == count]
        if not turns:
            return dict.fromkeys(VALUES)
        light, busy = [turn.light for turn in turns], [turn.busy for turn in turns]
        first, whole = _times_ms(light, is_first=True), _times_ms(light, is_first=False)
        busy_first, busy_whole = _times_ms(busy, is_first=True), _times_ms(busy, is_first=False)
        return {
            "tokens_s": statistics.median(summarize(run).tokens_s or 0.0 for run in busy),
            "requests": len(whole),
            **_spread("ttft_ms", first),
            **_spread("ms", whole),
            "busy_requests": len(busy_whole),
            "busy_p50_ttft_ms": _percentile(busy_first, 50),
            "busy_p90_ms": _percentile(busy_whole, 90),
            "busy_p99_ms": _percentile(busy_whole, 99),
            "cold_share": sum(turn.num_loads for turn in turns) / len(whole) if whole else None,
            "memory_mib": statistics.median(turn.memory_bytes / 2**20 for turn in turns),
        }

    @property
    def records(self) -> Iterator[Record]:
        for turn in self.turns:
            yield from turn.light.counted
            yield from turn.busy.counted


def _times_ms(runs: Sequence[Run], *, is_first: bool) -> list[float]:
    """To the first token, or to the end; the timeout of its plan for a request without."""
    found: list[float] = []
    for run in runs:
        timeout_s = float(run.header.plan["timeout_s"])
        for record in run.counted:
            took_s = record.ttft_s if is_first else record.took_s if record.outcome == "ok" else None
            found.append(1000 * (timeout_s if took_s is None else took_s))
    return found


def _spread(name: str, values: Sequence[float]) -> dict[str, float | None]:
    percentiles = {f"p{percent}_{name}": _percentile(values, percent) for percent in (50, 90, 99)}
    return percentiles | {f"slowest_{name}": max(values, default=None)}


def _percentile(values: Sequence[float], percent: float) -> float | None:
    """By nearest rank; none where it would be the largest of too few."""
    if not values or (percent >= 99 and len(values) < ENOUGH_FOR_P99):
        return None
    return float(np.percentile(values, percent, method="inverted_cdf"))


def to_json(standings: Sequence[Standing], counts: Sequence[int]) -> dict[str, Any]:
    """An object a server. What could not be measured is null, and `reason` says why."""
    ours = next((standing for standing in standings if standing.name == OURS), None)
    return {standing.name: _object(standing, ours, counts) for standing in standings}


def _object(standing: Standing, ours: Standing | None, counts: Sequence[int]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for count in counts:
        values = standing.values(count)
        found |= {f"{name}_{count}": _rounded(value) for name, value in values.items()}
        if ours and ours is not standing:
            ratios = _ratios(ours.values(count), values)
            found |= {f"vs_rookery_{name}_{count}": _rounded(value) for name, value in ratios.items()}
    records = list(standing.records)
    found["requests"] = len(records)
    found["errors"] = sum(record.outcome != "ok" for record in records)
    found["timeouts"] = sum(record.outcome == "timeout" for record in records)
    found["start_s"] = _rounded(statistics.median(standing.starts_s)) if standing.starts_s else None
    found["keeps_limit"] = standing.keeps_limit
    found["reason"] = "; ".join(standing.reasons) or None
    return found


def _ratios(ours: Mapping[str, float | None], theirs: Mapping[str, float | None]) -> dict[str, float | None]:
    found: dict[str, float | None] = {}
    for name in _COMPARED:
        better, worse = ours[name], theirs[name]
        if name not in _MORE_IS_BETTER:
            better, worse = worse, better
        found[name] = better / worse if better is not None and worse else None
    return found


def _rounded(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.4g}")


# --- Tables -----------------------------------------------------------------------------------------------------

HEADINGS = (
    "models", "server", "tokens/s", "TTFT p50, p90, p99 ms", "latency p50, p90, p99 ms",
    "busy: TTFT p50, latency p90 ms", "loads a request", "MiB", "requests: light, busy", "errors",
)  # fmt: skip


def rows(standings: Sequence[Standing], counts: Sequence[int]) -> Iterator[tuple[str, ...]]:
    """The cells below `HEADINGS`, by number of models."""
    for count in counts:
        for standing in standings:
            yield _row(standing, count)


def _row(standing: Standing, count: int) -> tuple[str, ...]:
    values = standing.values(count)
    turns = [turn for turn in standing.turns if turn.count == count]
    errors = sum(record.outcome != "ok" for turn in turns for run in (turn.light, turn.busy) for record in run.counted)
    cold = values["cold_share"]
    return (
        str(count),
        standing.name if standing.keeps_limit else f"{standing.name} (no limit)",
        _number(values["tokens_s"]),
        _three(values, "ttft_ms"),
        _three(values, "ms"),
        f"{_number(values['busy_p50_ttft_ms'])}, {_number(values['busy_p90_ms'])}",
        "–" if cold is None else f"{cold:.0%}",
        _number(values["memory_mib"]),
        f"{_number(values['requests'])}, {_number(values['busy_requests'])}",
        str(errors) if turns else "–",
    )


def _three(values: Mapping[str, float | None], name: str) -> str:
    """The third says what it is where it is the slowest of too few for a 99th percentile."""
    last = values[f"p99_{name}"]
    third = f"max {_number(values[f'slowest_{name}'])}" if last is None else _number(last)
    return f"{_number(values[f'p50_{name}'])}, {_number(values[f'p90_{name}'])}, {third}"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:,.0f}"


def table(standings: Sequence[Standing], counts: Sequence[int]) -> Table:
    """For the terminal."""
    found = Table(*HEADINGS[:2], title="The same requests to each server")
    for heading in HEADINGS[2:]:
        found.add_column(heading, justify="right")
    for number, row in enumerate(rows(standings, counts), 1):
        found.add_row(*row, end_section=number % len(standings) == 0)
    return found


def markdown(standings: Sequence[Standing], counts: Sequence[int]) -> str:
    """The same for a README."""
    lines = ["| " + " | ".join(HEADINGS) + " |", "|---:|---|" + "---:|" * (len(HEADINGS) - 2)]
    lines += ["| " + " | ".join(row) + " |" for row in rows(standings, counts)]
    return "\n".join(lines)
