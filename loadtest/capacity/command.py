"""`plan-capacity`: how many replicas hold a promise under some traffic, what binds them, and what they cost."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from loadtest.capacity.costs import BadCosts, Costs, LoadCosts, costs_of
from loadtest.capacity.figures import SimulatedFigures, figures
from loadtest.capacity.simulate import REFUSED, Cluster, Outcome, simulate
from loadtest.capacity.workload import Traffic, Workload, draw, of_calls
from loadtest.results.columns import Bools, nearest_rank
from loadtest.traffic.changing import resolve
from loadtest.traffic.plan import BadPlan
from loadtest.traffic.reading import read_plan
from loadtest.traffic.schedule import schedule

MAX_REFUSED = 0.001  # of the requests, whatever the promise says
# Simulated for one number of replicas: enough for a p99, some seconds' work. A queue that grows by a few per cent takes
# a minute to show, so of more traffic than that a slice of the replicas is simulated, never less time.
_LEAST_REQUESTS, _MOST_REQUESTS = 150_000, 400_000
_LEAST_S, _MOST_S = 60.0, 600.0
_LEAST_SLICE = 32  # replicas: of fewer, chance makes one busier than any of many
_FEWEST = 200  # requests, however long they take to come
_HOPELESS = 2_000_000  # requests: only what comes to far too few replicas is so much
_SPREAD_FROM = 2.0  # times a replica's share of requests: a model with more is asked of several
_DAY_S = 86_400
_PARTS = ("compute", "memory", "loads")


class BadPromise(ValueError):
    """An SLO that cannot be read; the message says how one is spelled."""


@dataclass(frozen=True, slots=True)
class Promise:
    """`p99_ttft=500ms`: of the requests, so many per cent have their first token, or all of it, within that time."""

    percent: float
    is_ttft: bool
    within_s: float

    @classmethod
    def parse(cls, text: str) -> Promise:
        """Raises: BadPromise"""
        found = re.fullmatch(r"p(\d{1,2}(?:\.\d+)?)(_ttft)?=(\d+(?:\.\d+)?)(ms|s)", text.strip())
        if found is None:
            raise BadPromise(f"{text[:60]!r} is no SLO; write one like p99_ttft=500ms or p50=2s.")
        percent, ttft, amount, unit = found.groups()
        return cls(float(percent), bool(ttft), float(amount) / (1000 if unit == "ms" else 1))

    def measure_s(self, outcome: Outcome) -> float:
        """What the promise is about, of all requests or of the last quarter's, whichever is worse.

        A backlog that grows shows in the last quarter first. Infinite where too many were refused.
        """
        at_s = outcome.workload.at_s
        return max(self._of(outcome, at_s >= 0), self._of(outcome, at_s >= 0.75 * at_s[-1]))

    def _of(self, outcome: Outcome, counted: Bools) -> float:
        answered = counted & (outcome.tier != REFUSED)
        if answered.sum() < (1 - MAX_REFUSED) * counted.sum():
            return math.inf
        ends = outcome.first_s if self.is_ttft else outcome.ended_s
        return nearest_rank(np.sort((ends - outcome.workload.at_s)[answered]), self.percent / 100)

    def holds(self, outcome: Outcome) -> bool:
        return self.measure_s(outcome) <= self.within_s


@dataclass(frozen=True, slots=True)
class Demand:
    """Traffic. `at(n)`: what stands for it where there are n replicas, and how many of them get it."""

    rate: float
    tokens_s: float
    at: Callable[[int], tuple[Workload, int]]

    @classmethod
    def whole(cls, workload: Workload) -> Demand:
        """These requests, whatever their number."""
        span_s = max(1e-9, float(workload.at_s[-1]))
        return cls(len(workload) / span_s, workload.num_tokens / span_s, lambda num_replicas: (workload, num_replicas))

    @classmethod
    def of(cls, traffic: Traffic, costs: Costs, seed: int = 1) -> Demand:
        """At least a minute of it, and as much as a percentile needs; of large traffic a slice of whole hosts."""
        longest_s = max(_LEAST_S, min(_MOST_S, _LEAST_REQUESTS / traffic.rate), _FEWEST / traffic.rate)

        def at(num_replicas: int) -> tuple[Workload, int]:
            least = max(_LEAST_SLICE, num_replicas * _MOST_REQUESTS / (traffic.rate * longest_s))
            simulated = min(num_replicas, math.ceil(least / costs.replicas_per_host) * costs.replicas_per_host)
            part = simulated / num_replicas
            duration_s = min(longest_s, _HOPELESS / (traffic.rate * part))
            spread_from = _SPREAD_FROM / num_replicas
            return draw(traffic, duration_s=duration_s, seed=seed, part=part, spread_from=spread_from), simulated

        return cls(traffic.rate, traffic.rate * traffic.tokens, at)


@dataclass(frozen=True, slots=True)
class Row:
    """So many replicas under the traffic; `figures` are of those that were simulated, but for the tokens a second."""

    replicas: int
    simulated_replicas: int
    simulated_s: float
    holds: bool
    promised_ms: float | None  # the percentile that the promise is about
    binds: str  # what would help most: compute, memory or loads
    figures: SimulatedFigures
    hosts: int
    page_cache_gib: float  # of each host, for the tier `host`
    usd_per_hour: float | None
    usd_per_1000_tweets: float | None


@dataclass(frozen=True, slots=True)
class Answer:
    """`replicas` is None where not even `max_replicas` hold the promise."""

    replicas: int | None
    rate: float
    costs: Costs
    rows: tuple[Row, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain; infinite numbers are None."""
        return {
            "replicas": self.replicas,
            "rate": self.rate,
            "costs": self.costs.name,
            "source": self.costs.source,
            "rows": [asdict(row) for row in self.rows],
        }


def rate_of(users: int, daily_posts: float, peak_factor: float) -> float:
    """Requests a second in the busiest hour of so many users, each of whom has so many texts written a day."""
    return users * daily_posts / _DAY_S * peak_factor


def search(holds: Callable[[int], bool], most: int, begin: int = 1) -> int | None:
    """The least number for which `holds`, which stays true once it is; None if `most` is too few."""
    below, number = 0, min(max(1, begin), most)
    while not holds(number):
        if number == most:
            return None
        below, number = number, min(2 * number, most)
    while number - below > 1:
        middle = (below + number) // 2
        below, number = (below, middle) if holds(middle) else (middle, number)
    return number


def plan(demand: Demand, costs: Costs, promise: Promise, max_replicas: int, price_per_hour: float | None) -> Answer:
    """Simulates one number of replicas after another; each starts with the most popular models in memory."""

    @lru_cache(maxsize=4)  # those that the search ends with are shown
    def simulated(num_replicas: int) -> Outcome:
        workload, num_simulated = demand.at(num_replicas)
        return simulate(workload, Cluster(costs, num_simulated, is_warm=True))

    most_tokens_s = costs.max_sequences / costs.step.step_s(1, costs.max_sequences)  # nobody can do more
    begin = int(demand.tokens_s / most_tokens_s)
    found = search(lambda number: promise.holds(simulated(number)), max_replicas, begin)
    n = found or max_replicas
    shown = sorted({max(1, n - 1), n, min(2 * n, max(n, max_replicas))})
    rows = tuple(_row(number, simulated(number), promise, price_per_hour) for number in shown)
    return Answer(found, demand.rate, costs, rows)


def _row(num_replicas: int, outcome: Outcome, promise: Promise, price_per_hour: float | None) -> Row:
    costs, part = outcome.cluster.costs, outcome.cluster.num_replicas / num_replicas
    workload, measured_s = outcome.workload, promise.measure_s(outcome)
    usd = price_per_hour * num_replicas if price_per_hour is not None else None
    span_s = max(1e-9, float(workload.at_s[-1]))
    tweets_h = 3600 * float(workload.num_choices[outcome.tier != REFUSED].sum()) / span_s / part
    found = figures(outcome)
    return Row(
        replicas=num_replicas,
        simulated_replicas=outcome.cluster.num_replicas,
        simulated_s=span_s,
        holds=measured_s <= promise.within_s,
        promised_ms=measured_s * 1e3 if np.isfinite(measured_s) else None,
        binds=_what_binds(outcome, promise),
        figures=replace(found, tokens_s=found.tokens_s / part),
        hosts=-(-num_replicas // costs.replicas_per_host),
        page_cache_gib=costs.host_models * costs.model_bytes / 2**30,
        usd_per_hour=usd,
        usd_per_1000_tweets=None if usd is None or not tweets_h else usd / tweets_h * 1000,
    )


def _what_binds(outcome: Outcome, promise: Promise) -> str:
    """Which part, twice as good, would help the promise most: asked of the simulator itself."""
    costs, step, load = outcome.cluster.costs, outcome.cluster.costs.step, outcome.cluster.costs.load
    beyond_s = step.per_row_beyond_s
    better = {
        "compute": replace(
            costs,
            step=replace(
                step,
                base_s=step.base_s / 2,
                per_model_s=step.per_model_s / 2,
                per_row_s=step.per_row_s / 2,
                per_row_beyond_s=None if beyond_s is None else beyond_s / 2,
                per_prompt_token_s=step.per_prompt_token_s / 2,
            ),
        ),
        "memory": replace(costs, slots=2 * costs.slots),
        "loads": replace(costs, load=LoadCosts(load.host_s / 2, load.disk_s / 2, load.hub_s / 2)),
    }

    def miss_s(part: str) -> float:
        changed = simulate(outcome.workload, replace(outcome.cluster, costs=better[part]))
        refused = float((changed.tier == REFUSED).mean())
        return promise.measure_s(replace(changed, tier=np.maximum(changed.tier, 0))) if not refused else 1e6 * refused

    return min(_PARTS, key=miss_s)


def plan_capacity(
    plan_name: Annotated[
        str | None, typer.Argument(metavar="PLAN", help="a plan of open-loop flows, instead of --models and the like")
    ] = None,
    *,
    rate: Annotated[
        float | None,
        typer.Option(help="requests a second; with a PLAN of multiples, what 1 x capacity is", min=1e-4, max=1e9),
    ] = None,
    users: Annotated[int | None, typer.Option(help="instead of --rate: people, or bots", min=1)] = None,
    daily_posts_per_user: Annotated[float, typer.Option(help="texts that each has written a day", min=0.01)] = 20.0,
    peak_factor: Annotated[float, typer.Option(help="the busiest hour's traffic over the mean", min=1)] = 2.5,
    models: Annotated[int, typer.Option(help="how many are asked for", min=1, max=10_000_000)] = 50_000,
    zipf: Annotated[float, typer.Option(help="exponent of their popularity; 0: all alike", min=0, max=10)] = 1.0,
    tokens: Annotated[float, typer.Option(help="of a text, on average", min=1, max=100_000)] = 35.0,
    prompt_tokens: Annotated[int, typer.Option(help="of a prompt", min=1, max=100_000)] = 4,
    slo: Annotated[str, typer.Option(help="what is to hold")] = "p99_ttft=500ms",
    device: Annotated[str, typer.Option(help="h100, cpu, or a JSON file of costs")] = "h100",
    price_per_hour: Annotated[float | None, typer.Option(help="of a replica, in dollars", min=0)] = None,
    max_replicas: Annotated[int, typer.Option(help="where the search ends", min=1, max=100_000)] = 1024,
    seed: Annotated[int, typer.Option(help="of the traffic", min=0)] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="end with one line of JSON")] = False,
) -> None:
    """How many GPUs, or CPU replicas, for this traffic: by simulation, with costs that were measured or fitted."""
    try:
        _check_finite(
            rate=rate,
            daily_posts_per_user=daily_posts_per_user,
            peak_factor=peak_factor,
            zipf=zipf,
            tokens=tokens,
            price_per_hour=price_per_hour,
        )
        costs, promise = costs_of(device), Promise.parse(slo)
        if plan_name is not None:
            demand = Demand.whole(_planned(plan_name, rate, costs))
        else:
            asked = rate_of(users, daily_posts_per_user, peak_factor) if users is not None else rate
            if asked is None:
                raise BadPromise("say how much traffic: a PLAN, --rate or --users")
            demand = Demand.of(Traffic(asked, models, zipf, tokens, prompt_tokens), costs, seed)
    except (BadCosts, BadPromise, BadPlan) as exc:
        raise typer.BadParameter(str(exc)) from exc
    answer = plan(
        demand, costs, promise, max_replicas, costs.price_per_hour if price_per_hour is None else price_per_hour
    )
    show(answer, slo, Console(stderr=as_json))
    if as_json:
        typer.echo(json.dumps(answer.to_json()))


def _check_finite(**values: float | None) -> None:
    """Raises: BadPromise. Typer lets nan pass any bound."""
    for name, value in values.items():
        if value is not None and not math.isfinite(value):
            raise BadPromise(f"--{name.replace('_', '-')} is {value}; it has to be a number")


def _planned(name: str, rate: float | None, costs: Costs) -> Workload:
    """The calls of a plan. Where it speaks of multiples, `rate` is the capacity and one replica's slots are what fits.

    Raises: BadPlan, also where it is a closed loop, whose rate only a server can tell.
    """
    read = read_plan(name)
    if read.needs_capacity and rate is None:
        raise BadPlan(f"plan {read.name!r} offers a multiple of what a server can do; say by --rate what that is")
    found = resolve(read, capacity_rps=rate, models_that_fit=costs.slots)
    if any(flow.arrivals.process == "closed" for flow in found.flows):
        raise BadPlan(f"plan {found.name!r} has a closed loop; only open ones say how much traffic comes")
    workload = of_calls(list(schedule(found, [f"bots/m{number}" for number in range(found.num_models)])))
    if not len(workload):
        raise BadPlan(f"plan {found.name!r} sends nothing")
    return workload


def show(answer: Answer, slo: str, console: Console) -> None:
    """The answer in words and a column for each number of replicas."""
    number = answer.replicas
    found = f"{number} replicas" if number is not None else f"{answer.rows[-1].replicas} replicas do not"
    console.print(f"{found} hold {slo} at {answer.rate:,.1f} requests a second.", style="bold")
    console.print(f"Costs: {answer.costs.name}, {answer.costs.source}.", soft_wrap=True)
    table = Table()
    table.add_column("replicas")
    for row in answer.rows:
        table.add_column(f"{row.replicas}", justify="right")
    for name, value in _LINES.items():
        table.add_row(name, *(value(row) for row in answer.rows))
    console.print(table)


def _ms(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f} ms"


def _usd(value: float | None) -> str:
    return "-" if value is None else f"${value:,.4g}"


def _by_tier(row: Row) -> str:
    return ", ".join(f"{tier} {value:,.0f}" for tier, value in row.figures.ttft_by_tier_ms.items())


_LINES: dict[str, Callable[[Row], str]] = {
    "simulated": lambda row: f"{row.simulated_replicas}, {row.simulated_s:,.0f} s",
    "holds": lambda row: "yes" if row.holds else "no",
    "what is promised": lambda row: _ms(row.promised_ms),
    "what binds": lambda row: row.binds,
    "utilisation, mean and highest": lambda row: f"{row.figures.utilisation:.0%}, {row.figures.utilisation_max:.0%}",
    "texts in a step": lambda row: f"{row.figures.texts_per_step:.1f}",
    "tokens a second": lambda row: f"{row.figures.tokens_s:,.0f}",
    "model in memory (hit rate)": lambda row: f"{row.figures.hit_rate:.1%}",
    "turns to load in use": lambda row: f"{row.figures.loading:.0%}",
    "first token, p50 and p99": lambda row: f"{_ms(row.figures.p50_ttft_ms)}, {_ms(row.figures.p99_ttft_ms)}",
    "first token by tier, median ms": _by_tier,
    "whole text, p50 and p99": lambda row: f"{_ms(row.figures.p50_ms)}, {_ms(row.figures.p99_ms)}",
    "refused": lambda row: f"{row.figures.refused / max(1, row.figures.requests):.2%}",
    "hosts, page cache of each": lambda row: f"{row.hosts}, {row.page_cache_gib:,.0f} GiB",
    "an hour": lambda row: _usd(row.usd_per_hour),
    "1,000 tweets": lambda row: _usd(row.usd_per_1000_tweets),
}
