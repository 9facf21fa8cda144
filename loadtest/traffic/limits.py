"""Which plans can be played: the allowed values of each field, and which of them do not go together."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from loadtest.traffic.plan import Arrivals, BadPlan, Flow, Models, Plan, Requests, Training
from loadtest.traffic.trace import read_trace


@dataclass(frozen=True, slots=True)
class Range:
    """Finite numbers from `least`, or above it, to `most`."""

    least: float
    most: float = math.inf
    is_open: bool = False

    def __contains__(self, value: float) -> bool:
        return math.isfinite(value) and self.least <= value <= self.most and not (self.is_open and value == self.least)

    def __str__(self) -> str:
        least = f"above {self.least:g}" if self.is_open else f"at least {self.least:g}"
        return least if math.isinf(self.most) else f"{least} and at most {self.most:g}"


_POSITIVE = Range(0, is_open=True)
_NOT_NEGATIVE = Range(0)
_SHARE = Range(0, 1)
_MOST_TOKENS = 100_000
_WEIGHT = Range(0, 1_000_000)
_COUNT = Range(1, 10_000_000)  # of models: an array of their weights must be held

RANGES: Mapping[type, Mapping[str, Range]] = {
    Plan: {"seed": Range(0, 2**63 - 1), "duration_s": _POSITIVE, "warmup_s": _NOT_NEGATIVE, "timeout_s": _POSITIVE},
    Flow: {"begins_s": _NOT_NEGATIVE, "ends_s": _POSITIVE},
    Arrivals: {
        "rate": _POSITIVE,
        "times_capacity": _POSITIVE,
        "burst_every_s": _POSITIVE,
        "burst_s": _POSITIVE,
        "burst_factor": Range(1),
        "period_s": _POSITIVE,
        "trough": _SHARE,
        "speed": _POSITIVE,
        "clients": Range(1, 100_000),
    },
    Models: {
        "first": Range(0, 10_000_000),
        "count": _COUNT,
        "times_fit": _POSITIVE,
        "exponent": Range(0, 10),
        "churn_s": _POSITIVE,
        "favourites": _COUNT,
    },
    Requests: {
        "streaming": _SHARE,
        "cancelled": _SHARE,
        "patience_s": _POSITIVE,
        "temperature": Range(0, 2),
        "top_p": Range(0, 1, is_open=True),
    },
    Training: {
        "jobs": Range(0, 10_000),
        "every_s": _NOT_NEGATIVE,
        "epochs": Range(1, 1_000),
        "posts": Range(1, 1_000_000),
    },
}


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing that is wrong with a plan."""

    key: str  # as TOML spells it: `flow 'quiet': arrivals.rate`
    value: Any
    allowed: str

    def __str__(self) -> str:
        return f"{self.key} = {self.value!r}: must be {self.allowed}"


def check(plan: Plan, source: str = "") -> Plan:
    """The plan, if it can be played. `source` is where it comes from.

    Raises: BadPlan naming the first thing that is wrong.
    """
    for fault in _faults(plan):
        raise BadPlan(f"{source or f'plan {plan.name!r}'}: {fault}")
    return plan


def _faults(plan: Plan) -> Iterator[Fault]:
    yield from _out_of_range(plan, "")
    yield from _out_of_range(plan.training, "training.")
    names = [flow.name for flow in plan.flows]
    if not names or len(set(names)) < len(names) or not all(names):
        yield Fault("names of flows", names, "one or more, each its own")
    for flow in plan.flows:
        for fault in _faults_of_flow(flow, plan):
            yield Fault(f"flow {flow.name!r}: {fault.key}", fault.value, fault.allowed)


def _out_of_range(part: object, prefix: str) -> Iterator[Fault]:
    for name, allowed in RANGES[type(part)].items():
        value = getattr(part, name)
        if value is not None and value not in allowed:
            yield Fault(prefix + name, value, str(allowed))


def _faults_of_flow(flow: Flow, plan: Plan) -> Iterator[Fault]:
    yield from _out_of_range(flow, "")
    for name in ("arrivals", "models", "requests"):
        yield from _out_of_range(getattr(flow, name), f"{name}.")
    if not flow.begins_s < plan.ends_s:
        yield Fault("begins_s", flow.begins_s, f"below the plan's end at {plan.ends_s:g} s")
    if flow.ends_s is not None and not flow.begins_s < flow.ends_s:
        yield Fault("ends_s", flow.ends_s, f"above begins_s, which is {flow.begins_s:g}")
    yield from _faults_of_arrivals(flow.arrivals, flow.models)
    yield from _faults_of_requests(flow.requests)


def _faults_of_arrivals(arrivals: Arrivals, models: Models) -> Iterator[Fault]:
    process = arrivals.process
    if process == "bursts" and not arrivals.burst_s < arrivals.burst_every_s:
        yield Fault("arrivals.burst_s", arrivals.burst_s, f"below burst_every_s, which is {arrivals.burst_every_s:g}")
    if process == "trace" and arrivals.trace is None:
        yield Fault("arrivals.trace", "", 'the name of a file, as process is "trace"')
    elif process == "trace" and arrivals.trace is not None and not arrivals.trace.is_file():
        yield Fault("arrivals.trace", str(arrivals.trace), "a file that is there")
    elif process == "trace" and arrivals.trace is not None:
        asked = int(read_trace(arrivals.trace).model.max()) + 1
        if models.times_fit is None and asked > models.count:
            yield Fault("models.count", models.count, f"at least {asked:,}, as the trace asks for so many")
    if arrivals.times_capacity is not None and process in ("trace", "closed"):
        yield Fault("arrivals.times_capacity", arrivals.times_capacity, f"absent where process is {process!r}")


def _faults_of_requests(requests: Requests) -> Iterator[Fault]:
    choices = dict(requests.choices)
    if not all(1 <= n <= 128 for n in choices):
        yield Fault("requests.choices", choices, "a table whose keys are between 1 and 128")
    elif not all(weight in _WEIGHT for weight in choices.values()) or not any(choices.values()):
        yield Fault("requests.choices", choices, "a table of weights from 0 to 1,000,000, one above 0")
    for name, lengths, least in (
        ("prompt_tokens", requests.prompt_tokens, 0),
        ("output_tokens", requests.output_tokens, 1),
    ):
        if not lengths.like_tweets and not least <= lengths.least <= lengths.most <= _MOST_TOKENS:
            pair, allowed = [lengths.least, lengths.most], f"two bounds in order, between {least} and {_MOST_TOKENS:,}"
            yield Fault(f"requests.{name}", pair, allowed)
