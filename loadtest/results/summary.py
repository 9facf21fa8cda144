"""The figures of a run.

What is counted. `requests` and all shares, latencies and lags are of the requests that were due after the warm-up.
Rates (`offered_s`, `requests_s`, `tokens_s`, `goodput_tokens_s`, `tweets_s`) are what came within the measured window,
divided by its length: requests that the warm-up left behind still use the server then, and what it answers after the
window's end it did not do in it. So a server that falls behind cannot gain by answering later. The window of a run that
was stopped ends there.

Latencies are of requests that were answered in full, from the moment when they were due; refused, failed, timed out and
cancelled ones are in none of them, so read them beside `refused_share` and `error_share`. Requests that had no answer
when a run was stopped are `stopped`: no errors, but the slowest are likely to be among them, so a note says how many
they are and how long they had waited. TTFT is that of streams; only
where nothing was streamed it is that of whole answers, whose first token comes at their end. Percentiles are by nearest
rank: each is a value that was measured.

A hit is an answer whose weights were on the device already; any other tier had to wait for them (`cold_share`). Both
are None where the server tells no tiers. A tweet is one choice of an answer that was given in full; the price is that
of the whole measured window, also of what was idle or refused in it.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np

from loadtest.results.columns import Bools, Columns, Floats, arrived, first_tokens, nearest_rank
from loadtest.results.record import LATE_S, TIERS, Record, Run

ENOUGH_FOR_P99 = 100  # of fewer values the 99th percentile is the largest


@dataclass(frozen=True, kw_only=True)
class Figures:
    """Of a run, or of one of its flows. Counts are of requests; None: there is nothing to tell it from."""

    requests: int = 0
    answered: int = 0
    errors: int = 0  # failed, and timeouts
    timeouts: int = 0
    refused: int = 0
    cancelled: int = 0
    stopped: int = 0  # had no answer when the run was stopped
    error_share: float | None = None
    refused_share: float | None = None
    mean_ttft_ms: float | None = None
    p50_ttft_ms: float | None = None
    p90_ttft_ms: float | None = None
    p99_ttft_ms: float | None = None
    max_ttft_ms: float | None = None
    mean_ms: float | None = None
    p50_ms: float | None = None
    p90_ms: float | None = None
    p99_ms: float | None = None
    max_ms: float | None = None
    p50_itl_ms: float | None = None  # of streams: the mean time between two tokens of each
    p90_itl_ms: float | None = None
    p99_itl_ms: float | None = None
    p99_gap_ms: float | None = None  # between two pieces of a stream, over all pieces
    max_gap_ms: float | None = None
    p50_lag_ms: float | None = None  # how late the tester sent
    p99_lag_ms: float | None = None
    max_lag_ms: float | None = None
    offered_s: float | None = None
    requests_s: float | None = None  # answered in full
    tokens_s: float | None = None  # of answers given in full, and of those whose reader left as planned
    goodput_tokens_s: float | None = None  # of answers given in full
    tweets: int = 0  # that were finished in the window
    tweets_s: float | None = None
    prompt_tokens: int = 0  # of all requests that were answered
    output_tokens: int = 0
    hit_rate: float | None = None
    cold_share: float | None = None


@dataclass(frozen=True, kw_only=True)
class TierFigures:
    """Of the answers whose weights came from one tier."""

    answered: int
    share: float
    p50_ttft_ms: float | None = None
    p90_ttft_ms: float | None = None
    p99_ttft_ms: float | None = None
    p50_ms: float | None = None
    p99_ms: float | None = None
    p50_load_ms: float | None = None  # what the server says it waited for the weights
    p99_load_ms: float | None = None


@dataclass(frozen=True, kw_only=True)
class Summary(Figures):
    """Of a whole run. Jobs are all of it: one that began in the warm-up is counted too."""

    usd_per_1000_tweets: float | None = None
    jobs: int = 0
    jobs_done: int = 0
    mean_job_ms: float | None = None  # of those that were done
    p50_job_ms: float | None = None
    max_job_ms: float | None = None
    window_s: float = 0.0
    plan: str = ""
    target: str = ""
    flows: Mapping[str, Figures] = field(default_factory=dict)
    tiers: Mapping[str, TierFigures] = field(default_factory=dict)
    kinds: Mapping[str, int] = field(default_factory=dict)  # of refusals and errors, most frequent first
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Plain numbers, rounded to six digits; flat, but for `flows`, `tiers` and `kinds`."""
        line = plain(self)
        line["flows"] = {name: plain(figures) for name, figures in self.flows.items()}
        line["tiers"] = {name: plain(figures) for name, figures in self.tiers.items()}
        return line | {"kinds": dict(self.kinds), "notes": list(self.notes)}


def summarize(run: Run, price_per_hour: float | None = None) -> Summary:
    """The figures of a run; with the price of what served it, in dollars, also the cost of its tweets.

    Raises: ValueError: the price is no positive number.
    """
    if price_per_hour is not None and not (0 < price_per_hour < math.inf):
        raise ValueError(f"the price is {price_per_hour} dollars an hour; it has to be above 0")
    columns = Columns.of([record for record in run.records if record.kind == "generate"])
    jobs = [record for record in run.records if record.kind == "train"]
    begin, end = run.window_s
    figures = figures_of(columns, begin, end)
    counted = columns[columns.at >= begin]
    kinds = Counter(counted.error.names[code] for code in counted.error.codes[counted.is_error | _refused(counted)])
    usd = None
    if price_per_hour is not None and figures.tweets:
        usd = price_per_hour * (end - begin) / 3600 / figures.tweets * 1000
    return Summary(
        **vars(figures),
        **_jobs(jobs),
        usd_per_1000_tweets=usd,
        window_s=end - begin,
        plan=str(run.header.plan.get("name", "")),
        target=run.header.target,
        flows={name: figures_of(columns[columns.flow.where(name)], begin, end) for name in columns.flow.names},
        tiers=_tiers(counted[counted.ok]),
        kinds=dict(kinds.most_common()),
        notes=(*run.header.notes, *run.notes, *_notes_of_stop(run, counted), *_notes(figures)),
    )


def figures_of(columns: Columns, begin: float, end: float) -> Figures:
    """The figures of the requests in `columns`, in the window from `begin` to `end`."""
    counted = columns[columns.at >= begin]
    num = len(counted)
    answered = counted[counted.ok]
    refused = int(_refused(counted).sum())
    errors = int(counted.is_error.sum())
    hit_rate = _hit_rate(answered)
    return Figures(
        requests=num,
        answered=len(answered),
        errors=errors,
        timeouts=int(counted.is_timeout.sum()),
        refused=refused,
        cancelled=int(counted.outcome.where("cancelled").sum()),
        stopped=int(counted.is_stopped.sum()),
        error_share=errors / num if num else None,
        refused_share=refused / num if num else None,
        **_spread("ttft_ms", counted.ttft[first_tokens(counted)], ("mean", "p50", "p90", "p99", "max")),
        **_spread("ms", answered.took, ("mean", "p50", "p90", "p99", "max")),
        **_spread("itl_ms", answered.time_per_token, ("p50", "p90", "p99")),
        **_spread("gap_ms", answered.gaps, ("p99", "max")),
        **_spread("lag_ms", counted.lag, ("p50", "p99", "max")),
        **_rates(columns, begin, end),
        prompt_tokens=int(answered.prompt_tokens.sum()),
        output_tokens=int(answered.tokens.sum()),
        hit_rate=hit_rate,
        cold_share=None if hit_rate is None else 1 - hit_rate,
    )


def warmth(tier: str) -> tuple[int, str]:
    """A key to sort tiers by: the warmest first, unknown ones last."""
    return (TIERS.index(tier) if tier in TIERS else len(TIERS), tier)


def plain(figures: object) -> dict[str, Any]:
    """The plain fields of a dataclass of figures, in their order, rounded to six digits."""
    names = (item.name for item in fields(figures))  # type: ignore[arg-type]
    values = {name: getattr(figures, name) for name in names}
    return {
        name: float(f"{value:.6g}") if isinstance(value, float) else value
        for name, value in values.items()
        if not isinstance(value, (Mapping, tuple))
    }


def _rates(columns: Columns, begin: float, end: float) -> dict[str, Any]:
    seconds = end - begin
    finished = columns[columns.ok & (columns.ended >= begin) & (columns.ended < end)]
    tweets = int(finished.choices.sum())
    if seconds <= 0:
        return {"tweets": tweets}
    edges = np.array([begin, end])
    good = float(np.diff(arrived(columns[columns.ok], edges))[0])
    left = float(np.diff(arrived(columns[columns.outcome.where("cancelled")], edges))[0])
    return {
        "offered_s": float(((columns.at >= begin) & (columns.at < end)).sum() / seconds),
        "requests_s": len(finished) / seconds,
        "tokens_s": (good + left) / seconds,
        "goodput_tokens_s": good / seconds,
        "tweets": tweets,
        "tweets_s": tweets / seconds,
    }


def _tiers(answered: Columns) -> dict[str, TierFigures]:
    told = answered[~answered.tier.where("")]
    found = {name: told[told.tier.where(name)] for name in sorted(told.tier.names, key=warmth)}
    return {
        name: TierFigures(
            answered=len(rows),
            share=len(rows) / len(told),
            **_spread("ttft_ms", rows.ttft[first_tokens(rows)], ("p50", "p90", "p99")),
            **_spread("ms", rows.took, ("p50", "p99")),
            **_spread("load_ms", rows.load, ("p50", "p99")),
        )
        for name, rows in found.items()
        if len(rows)
    }


def _hit_rate(answered: Columns) -> float | None:
    told = ~answered.tier.where("")
    return float(answered.tier.where("device")[told].mean()) if told.any() else None


def _refused(columns: Columns) -> Bools:
    return columns.outcome.where("refused")


def _jobs(jobs: list[Record]) -> dict[str, Any]:
    done = np.array([job.took_s for job in jobs if job.outcome == "ok"])
    return {"jobs": len(jobs), "jobs_done": len(done), **_spread("job_ms", done, ("mean", "p50", "max"))}


def _spread(suffix: str, seconds: Floats, wanted: tuple[str, ...]) -> dict[str, Any]:
    """{"p50_ms": …}: `wanted` of the values that are numbers, in milliseconds; none of none."""
    values = np.sort(seconds[~np.isnan(seconds)]) * 1000
    if not len(values):
        return {}
    found = {"mean": float(values.mean()), "max": float(values[-1])}
    found |= {name: nearest_rank(values, int(name[1:]) / 100) for name in wanted if name[0] == "p"}
    return {f"{name}_{suffix}": found[name] for name in wanted}


def _notes_of_stop(run: Run, counted: Columns) -> list[str]:
    if run.stopped_s is None:
        return []
    whole_s = run.header.warmup_s + run.header.duration_s
    notes = [f"The run was stopped after {run.stopped_s:.1f} s of {whole_s:.1f}."]
    waiting = counted[counted.is_stopped]
    if len(waiting):
        notes.append(
            f"{share_text(len(waiting), len(counted))} of requests had no answer by then, the oldest after "
            f"{waiting.took.max():.1f} s; they are in no latency, which may leave out the slowest."
        )
    else:
        notes.append("Requests that had no answer by then are in no figure, so the slowest may be missing.")
    return notes


def _notes(figures: Figures) -> list[str]:
    notes: list[str] = []
    if not figures.requests:
        return ["No request was due after the warm-up: there is nothing to tell."]
    lost = figures.refused + figures.errors
    if lost:
        notes.append(
            f"Latencies are of the {share_text(figures.answered, figures.requests)} of requests that were answered: "
            f"{share_text(figures.refused, figures.requests)} were refused and "
            f"{share_text(figures.errors, figures.requests)} failed, and are in none of them."
        )
    if 0 < figures.answered < ENOUGH_FOR_P99:
        notes.append(f"p99 of {figures.answered} answers is their largest, or near it: it takes {ENOUGH_FOR_P99}.")
    if figures.p99_lag_ms is not None and figures.p99_lag_ms > 1000 * LATE_S:
        notes.append(
            f"The tester was late itself (p99 {figures.p99_lag_ms:.0f} ms after a request was due); its lag is in the "
            "latencies."
        )
    return notes


def share_text(part: float, whole: float) -> str:
    """`7.1 %`; never 0 % of something, nor 100 % of less than all."""
    percent = 100 * part / whole
    if 0 < percent < 0.1:
        return "< 0.1 %"
    if 99.9 < percent < 100:
        return "> 99.9 %"
    return f"{percent:.0f} %" if percent in (0, 100) else f"{percent:.1f} %"
