"""The highest rate at which a server still holds what is asked of it, found by doubling, then by halving the gap.

It knows figures and rates; how a plan is played is a function that it is given.
"""

from __future__ import annotations

import math
import re
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from loadtest.results.record import Run
from loadtest.results.summary import Summary
from loadtest.traffic.changing import override
from loadtest.traffic.plan import Plan

_GOAL = re.compile(
    r"(?:(?P<rank>p50|p90|p99|mean|max)(?:_(?P<of>ttft|latency|itl))?|errors)=(?P<limit>\d+(?:\.\d+)?)(?P<unit>ms|s|%)"
)
_FIELDS = {"ttft": "_ttft_ms", "latency": "_ms", "itl": "_itl_ms", None: "_ms"}
_DEFAULT_ERRORS = "errors=1%"
_PRECISION = 1.05  # of the rate that is found over the lowest that failed
_MAX_PROBES = 24
_STEP_DOWN = 0.9  # of a rate that did not hold when it was tried again
_LIMITS_A_PROBE = 20  # at least: a queue that grows by a tenth has to meet the limit within the probe
_LEFT = 0.05  # of what becomes due in half a probe, by which the queue may grow in it


class BadGoal(ValueError):
    """What `--slo` was given and cannot be; the message says what it may be."""


@dataclass(frozen=True, slots=True)
class Goal:
    """One limit: `field` of a summary must not be above it. Milliseconds, or a share."""

    text: str
    field: str
    limit: float

    def value(self, summary: Summary) -> float | None:
        """None where nothing was answered, or nothing of this kind."""
        if self.field != "errors":
            value: float | None = getattr(summary, self.field)
            return value
        return (summary.errors + summary.refused) / summary.requests if summary.requests else None

    def holds(self, summary: Summary) -> bool:
        value = self.value(summary)
        return value is not None and value <= self.limit


def read_goals(texts: Sequence[str]) -> tuple[Goal, ...]:
    """`p99_ttft=500ms`, `p50=2s`, `errors=1%`. Who is refused has no latency, so there is always a limit of errors.

    Raises: BadGoal
    """
    goals = tuple(map(_goal, texts))
    return goals if any(goal.field == "errors" for goal in goals) else (*goals, _goal(_DEFAULT_ERRORS))


def _goal(text: str) -> Goal:
    found = _GOAL.fullmatch(text)
    if found is not None and (found["rank"] is None) == (found["unit"] == "%"):
        limit = float(found["limit"])
        if found["rank"] is None:
            return Goal(text, "errors", limit / 100)
        field = found["rank"] + _FIELDS[found["of"]]
        if field in Summary.__dataclass_fields__:
            return Goal(text, field, limit * (1000 if found["unit"] == "s" else 1))
    raise BadGoal(
        f"{text!r} is no goal: write p50, p90, p99, mean or max, maybe with _ttft or _latency (p50, p90, p99 also "
        "with _itl), and a time: p99_ttft=500ms, p50=2s; or a share of errors and refusals: errors=1%"
    )


def longest_limit_s(goals: Sequence[Goal]) -> float:
    """0 where no goal is a time."""
    return max((goal.limit / 1000 for goal in goals if goal.field != "errors"), default=0.0)


def least_probe_s(goals: Sequence[Goal]) -> float:
    """How long a probe has to be for these."""
    return _LIMITS_A_PROBE * longest_limit_s(goals)


@dataclass(frozen=True, slots=True)
class Probe:
    """One trial: a rate, and whether all goals held and the server kept up with it."""

    rate: float
    summary: Summary
    held: bool
    run: Run
    kept_up: bool = True


def keeps_up(run: Run) -> bool:
    """Whether no queue grew in the second half of the window: then every latency holds, if only the run is short.

    The number in flight is that of arrivals by chance, so three standard deviations of it are no growth.
    """
    begin, end = run.window_s
    middle = (begin + end) / 2
    calls = [record for record in run.records if record.kind == "generate"]
    num_due = sum(middle <= record.at_s < end for record in calls)
    before, after = (sum(record.at_s < at <= record.ended_s for record in calls) for at in (middle, end))
    return after - before <= _LEFT * num_due + 3 * math.sqrt(after)


Play = Callable[[Plan], Awaitable[tuple[Run, Summary]]]
"""Plays a plan and waits until the server is idle again."""


async def find_rate(
    plan: Plan, goals: Sequence[Goal], play: Play, *, rate: float, probe_s: float, told: Callable[[Probe], None]
) -> Probe | None:
    """The highest rate that held, tried twice; None where not even the lowest did. `rate`: that of `plan`.

    Each probe is the plan at another rate and of another seed, `probe_s` seconds long, of which `least_probe_s` says
    what is enough. Lengths and models come in the same distribution; more requests a second ask for nothing else.
    """
    search = _Search(plan, goals, play, rate, probe_s, told)
    best = await search.bracket(rate)
    return None if best is None else await search.confirm(await search.narrow(best))


class _Search:
    def __init__(
        self,
        plan: Plan,
        goals: Sequence[Goal],
        play: Play,
        rate: float,
        probe_s: float,
        told: Callable[[Probe], None],
    ) -> None:
        self._plan, self._goals, self._play, self._told = plan, goals, play, told
        self._rate, self._probe_s = rate, probe_s
        self._num_probes = 0
        self._failed: float | None = None  # the lowest rate that did not hold

    async def bracket(self, rate: float) -> Probe | None:
        """Doubles from `rate` until the goals do not hold, or halves until they do; gives the best that held."""
        best = await self._probe(rate)
        while best.held and self._may_go_on:
            probe = await self._probe(best.rate * 2)
            if not probe.held:
                return best
            best = probe
        while not best.held and self._may_go_on and best.rate * self._probe_s >= 2:  # with less there is no request
            best = await self._probe(best.rate / 2)
        return best if best.held else None

    async def narrow(self, best: Probe) -> Probe:
        while self._failed is not None and self._failed / best.rate > _PRECISION and self._may_go_on:
            probe = await self._probe((best.rate + self._failed) / 2)
            best = probe if probe.held else best
        return best

    async def confirm(self, best: Probe) -> Probe | None:
        """Once more, as one good probe out of many may be luck; a little lower where it was."""
        rate = best.rate
        while True:
            probe = await self._probe(rate)
            if probe.held:
                return probe
            if not self._may_go_on:
                return None
            rate *= _STEP_DOWN

    @property
    def _may_go_on(self) -> bool:
        return self._num_probes < _MAX_PROBES

    async def _probe(self, rate: float) -> Probe:
        self._num_probes += 1
        plan = override(
            self._plan,
            rate_scale=rate / self._rate,
            duration_s=self._probe_s,
            seed=self._plan.seed + 1000 * self._num_probes,
        )
        run, summary = await self._play(plan)
        kept_up = keeps_up(run)
        probe = Probe(rate, summary, kept_up and all(goal.holds(summary) for goal in self._goals), run, kept_up)
        if not probe.held:
            self._failed = rate if self._failed is None else min(rate, self._failed)
        self._told(probe)
        return probe
