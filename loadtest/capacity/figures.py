"""What a simulated run was like, in the words of `loadtest.results`; or as records, for its reports."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from loadtest.capacity.simulate import REFUSED, TIERS, Outcome
from loadtest.capacity.workload import Floats
from loadtest.results.columns import nearest_rank
from loadtest.results.record import Record


@dataclass(frozen=True, slots=True)
class SimulatedFigures:
    """Of the requests that began after the warm-up. Times in milliseconds; None where there was nothing to count.

    Percentiles by nearest rank, as those of a run.
    """

    requests: int
    refused: int
    p50_ttft_ms: float | None
    p99_ttft_ms: float | None
    p50_ms: float | None
    p99_ms: float | None
    tokens_s: float
    hit_rate: float  # of the requests that were answered: the model was in memory
    cold_share: float
    ttft_by_tier_ms: dict[str, float]  # medians
    share_by_tier: dict[str, float]
    texts_per_step: float
    utilisation: float  # of the time that replicas step, their mean
    utilisation_max: float  # the busiest replica's
    loading: float  # of the replicas' turns to load, those in use; their mean
    loads: int
    evictions: int
    reload_rate: float  # of the loads, those of a model that the replica had before


def figures(outcome: Outcome, *, warmup_s: float = 0.0) -> SimulatedFigures:
    """Without a record a request: for millions of them."""
    workload = outcome.workload
    counted = workload.at_s >= warmup_s
    answered = counted & (outcome.tier != REFUSED)
    ttft_s = (outcome.first_s - workload.at_s)[answered]
    took_s = (outcome.ended_s - workload.at_s)[answered]
    tier, num = outcome.tier[answered], max(1, int(answered.sum()))
    tokens = (workload.output_tokens * workload.num_choices)[answered].sum()
    span_s = _span_s(outcome, answered)
    end_s = float(np.nanmax(outcome.ended_s)) if (outcome.tier != REFUSED).any() else 1.0
    hits = float((tier == 0).sum()) / num
    return SimulatedFigures(
        requests=int(counted.sum()),
        refused=int((counted & (outcome.tier == REFUSED)).sum()),
        p50_ttft_ms=_percentile_ms(ttft_s, 50),
        p99_ttft_ms=_percentile_ms(ttft_s, 99),
        p50_ms=_percentile_ms(took_s, 50),
        p99_ms=_percentile_ms(took_s, 99),
        tokens_s=float(tokens) / span_s,
        hit_rate=hits,
        cold_share=1 - hits if answered.any() else 0.0,
        ttft_by_tier_ms={
            name: float(np.median(ttft_s[tier == code])) * 1e3
            for code, name in enumerate(TIERS)
            if (tier == code).any()
        },
        share_by_tier={name: float((tier == code).sum()) / num for code, name in enumerate(TIERS)},
        texts_per_step=float((workload.output_tokens * workload.num_choices)[outcome.tier != REFUSED].sum())
        / max(1.0, outcome.num_steps),
        utilisation=float(outcome.busy_s.mean()) / end_s,
        utilisation_max=float(outcome.busy_s.max()) / end_s,
        loading=float(outcome.loading_s.mean()) / end_s / outcome.cluster.costs.parallel_loads,
        loads=outcome.num_loads,
        evictions=outcome.num_evictions,
        reload_rate=outcome.num_reloads / max(1, outcome.num_loads),
    )


def records(outcome: Outcome) -> Iterator[Record]:
    """One a request, in the order in which they ended; the refused ones end when they come."""
    workload = outcome.workload
    ends = np.where(outcome.tier == REFUSED, workload.at_s, outcome.ended_s)
    for request in np.argsort(ends, kind="stable").tolist():
        at_s, code = float(workload.at_s[request]), int(outcome.tier[request])
        is_ok = code != REFUSED
        num_choices = int(workload.num_choices[request])
        yield Record(
            number=request,
            flow="simulated",
            model=workload.names[int(workload.model[request])],
            at_s=at_s,
            sent_s=at_s,
            ended_s=float(ends[request]),
            outcome="ok" if is_ok else "refused",
            status=200 if is_ok else 429,
            error="" if is_ok else "overloaded",
            first_s=float(outcome.first_s[request]) if is_ok else None,
            tier=TIERS[code] if is_ok else "",
            load_s=float(outcome.load_s[request]) if is_ok else None,
            prompt_tokens=int(workload.prompt_tokens[request]),
            output_tokens=int(workload.output_tokens[request]) * num_choices if is_ok else 0,
            num_choices=num_choices,
        )


def _span_s(outcome: Outcome, answered: np.ndarray[tuple[int], np.dtype[np.bool_]]) -> float:
    """From the first arrival to the last end among those counted."""
    if not answered.any():
        return 1.0
    return float(outcome.ended_s[answered].max() - outcome.workload.at_s[answered].min())


def _percentile_ms(values_s: Floats, percent: float) -> float | None:
    return nearest_rank(np.sort(values_s), percent / 100) * 1e3 if len(values_s) else None
