"""Fits `Costs` to a live server by short closed-loop probes over HTTP.

    python -m loadtest.capacity.calibrate http://127.0.0.1:8000 --models 'bench/*' > costs.json

Who is asked must do nothing else meanwhile. It knows the server by its answers alone; where there are several replicas,
the rule by which models find their homes tells which of them a probe keeps busy.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from loadtest.capacity.costs import PRESETS, Costs, StepCosts
from loadtest.capacity.routing import SPARE_LOAD, order
from loadtest.client.facts import Server, look_at
from loadtest.client.run import run_plan
from loadtest.client.sender import open_session
from loadtest.client.target import Target
from loadtest.results.record import Record
from loadtest.traffic.plan import Arrivals, Flow, Lengths, Models, Plan, Requests

T = TypeVar("T")

WARMUP_S = 0.6
# What cannot be true, but of a machine that did something else meanwhile.
MOST_ERROR = 0.25  # of the fit, in the median over its probes
MOST_SLOWER = 1.5  # two that share all their cores take twice as long each, so 1
MOST_LONGER = 9.0  # of a load beside replicas that take all cores
MOST_REQUEST_S = 0.25
_TOKENS = 48
_ROUNDS = 3  # all shapes in turn, of which medians count: what a machine does beside it for a while falls on all
_MOST = SPARE_LOAD - 2  # texts at a replica, so that none spills to another
_SHAPES = ((1, 1), (1, 4), (1, 8), (1, _MOST), (2, 1), (4, 1), (2, 4), (4, 3), (6, 1), (6, 2))  # models, texts of each


@dataclass(frozen=True, slots=True)
class Probe:
    """What the texts of one replica were seen to take."""

    num_models: int
    num_rows: float  # that step at once: less than there are clients, who need time to ask again
    step_s: float
    ttft_s: float
    prompt_tokens: float
    busy: float = 0.0  # part of the host's replicas that stepped when a request came
    num_texts: int = 1  # clients of each model

    def request_s(self, step: StepCosts) -> float:
        """What a first token took beside the engine's time, which is a step, and half of one that goes on already."""
        steps = 1.5 if self.busy else 1.0
        return self.ttft_s - steps * self.step_s - step.per_prompt_token_s * (self.prompt_tokens - 1)


class Prober:
    """Asks the models of a server whose replicas are all alike."""

    def __init__(self, target: Target, server: Server, probe_s: float) -> None:
        self._target, self._models, self._probe_s = target, server.models, probe_s
        self.num_replicas = int(server.told.get("replicas") or 1)
        self.homes = [order(model, self.num_replicas)[0] for model in self._models]

    def at_home(self, seat: int) -> list[int]:
        """Models, as indices, whose home is the replica at `seat`."""
        return [index for index, home in enumerate(self.homes) if home == seat]

    def name(self, index: int) -> str:
        return self._models[index]

    async def ask(self, flows: Iterable[Flow], names: Sequence[str] = ()) -> list[Record]:
        """The answers in full that began after the warm-up. `names`: other models than all, in another order.

        Raises: SystemExit when there is no answer.
        """
        plan = Plan("probe", "", tuple(flows), duration_s=self._probe_s, warmup_s=WARMUP_S)
        run = await run_plan(plan, self._target, models=names or self._models)
        counted = run.counted or run.records  # of a server that hangs, the first answers are all there is
        answered = [record for record in counted if record.outcome == "ok" and record.first_s is not None]
        if not answered:
            kinds = sorted({record.error or record.outcome for record in run.records})
            raise SystemExit(
                f"{self._target.url} answered no probe in {plan.duration_s:g} s: {', '.join(kinds) or 'nothing'}"
            )
        return answered

    async def probe(self, num_models: int, num_texts: int, seats: Sequence[int] = (0,)) -> Probe:
        """`num_texts` of each of `num_models` models of each replica at `seats`: what those of the first take."""
        for index in (index for seat in seats for index in self.at_home(seat)[:num_models]):
            warm = Plan("warm", "", (_flow("warm", index, 1, tokens=1),), duration_s=0.05, warmup_s=0.0)
            await run_plan(warm, self._target, models=self._models)
        flows = [
            _flow(f"{seat}-{index}", index, num_texts) for seat in seats for index in self.at_home(seat)[:num_models]
        ]
        answered = [record for record in await self.ask(flows) if record.flow.startswith(f"{seats[0]}-")]
        steady = [record for record in answered if record.output_tokens > 1]
        stepping = statistics.fmean((r.ended_s - (r.first_s or 0)) / r.took_s for r in steady)
        return Probe(
            num_models=num_models,
            num_rows=max(1.0, num_models * num_texts * stepping),
            step_s=statistics.median((r.ended_s - (r.first_s or 0)) / (r.output_tokens - 1) for r in steady),
            ttft_s=statistics.median(r.ttft_s or 0.0 for r in answered),
            prompt_tokens=statistics.fmean(r.prompt_tokens for r in answered),
            busy=len(seats) / self.num_replicas if num_models * num_texts > 1 else 0.0,
            num_texts=num_texts,
        )


async def calibrate(
    url: str, patterns: Sequence[str] = (), *, like: Costs = PRESETS["cpu"], probe_s: float = 1.6, key: str = ""
) -> Costs:
    """Costs of the server at `url`. What no probe could show (the Hub, a disk without a cold file) is as in `like`.

    So is what was fitted and cannot be true; then `source` says it.
    Needs some models whose home is the first replica, and for the costs of loads more models than fit.
    """
    target = Target(url, key=key)
    server = await look_at(target, patterns=patterns, is_fit_needed=False)
    prober = Prober(target, server, probe_s)
    slots, model_bytes = await _room(target, server.models[0]) or (like.slots, like.model_bytes)
    room = min(slots, min(len(prober.at_home(seat)) for seat in range(prober.num_replicas)))
    shapes = [shape for shape in _SHAPES if shape[0] <= room and shape[0] * shape[1] <= _MOST]
    probes = medians([await prober.probe(*shape) for _ in range(_ROUNDS) for shape in shapes])
    judge, step = Judge(like.name), replace(fit_steps(probes), per_prompt_token_s=await _prompt_cost(prober))
    error = _median_error(step, probes)
    if judge.doubts("the error of the fitted steps", error, 0.0, MOST_ERROR):
        step = like.step
    crowded = medians(await _probe_neighbours(prober, room))
    if crowded:
        most = MOST_SLOWER * (prober.num_replicas - 1)
        reading, rest = fit_neighbours(crowded, step)
        step = replace(
            step,
            while_neighbour=judge.choose("while_neighbour", rest, 0.0, most, like.step.while_neighbour),
            reading_while_neighbour=judge.choose("reading_while_neighbour", reading, 0.0, most, None),
        )
    request_s, request_busy_s = fit_requests([*probes, *crowded], step)
    request_s = judge.choose("request_s", request_s, 1e-5, MOST_REQUEST_S, like.request_s)
    request_busy_s = judge.choose("request_busy_s", request_busy_s, request_s, request_s + MOST_REQUEST_S, request_s)
    costs = replace(
        like,
        name="calibrated",
        source=f"fitted to {url} by {len(probes) + len(crowded)} medians of {_ROUNDS} probes of {probe_s:g} s; not "
        "probed: the Hub",
        step=replace(step, while_loading=like.step.while_loading),
        slots=slots,
        request_s=request_s,
        request_busy_s=request_busy_s,
        replicas_per_host=prober.num_replicas,
        model_bytes=model_bytes,
        fit={"steps_median_error": error},
    )
    if min(len(prober.at_home(seat)) for seat in range(prober.num_replicas)) > slots:
        costs = await _with_loading(prober, await _with_loads(prober, costs, judge), judge)
        if crowded:
            costs = await _with_busy_loads(prober, costs, judge)
    return replace(costs, source="; ".join([costs.source, *judge.notes]))


async def _room(target: Target, model: str) -> tuple[int, int] | None:
    """How many models like this one fit into a replica, and the bytes that it takes there; None if nobody says."""
    body = {"model": model, "prompt": "a", "max_tokens": 1}
    async with open_session(target) as session:
        async with session.post(target.at("/v1/completions"), json=body) as response:
            await response.read()
        async with session.get(target.at("/v1/replicas")) as response:
            replicas = (await response.json()).get("data", []) if response.status == 200 else []
    for replica in replicas:
        for resident in replica.get("residents", ()):
            if resident["model"] == model and resident["bytes"]:
                return max(1, replica["budget_bytes"] // resident["bytes"]), resident["bytes"]
    return None


@dataclass(slots=True)
class Judge:
    """Takes what was fitted where it can be true, else what a preset has, and notes that."""

    preset: str
    notes: list[str] = field(default_factory=list)

    def choose(self, name: str, fitted: float, least: float, most: float, otherwise: T) -> float | T:
        return otherwise if self.doubts(name, fitted, least, most) else fitted

    def doubts(self, name: str, fitted: float, least: float, most: float) -> bool:
        if least <= fitted <= most:
            return False
        self.notes.append(f"as in the preset {self.preset}, because {name} came out as {fitted:.4g}")
        return True


def medians(probes: Sequence[Probe]) -> list[Probe]:
    """A probe for each shape: the medians of its rounds."""
    rounds: dict[tuple[int, int, float], list[Probe]] = {}
    for probe in probes:
        rounds.setdefault((probe.num_models, probe.num_texts, probe.busy), []).append(probe)
    return [
        replace(
            found[0],
            num_rows=statistics.median(probe.num_rows for probe in found),
            step_s=statistics.median(probe.step_s for probe in found),
            ttft_s=statistics.median(probe.ttft_s for probe in found),
            prompt_tokens=statistics.median(probe.prompt_tokens for probe in found),
        )
        for found in rounds.values()
    ]


def fit_steps(probes: Sequence[Probe], cheap_rows: int = 8) -> StepCosts:
    """The least sum of relative errors, not of squares: a probe that was disturbed has little say. No cost below 0."""
    features = np.array(
        [
            (1.0, probe.num_models, min(probe.num_rows, cheap_rows), max(0.0, probe.num_rows - cheap_rows))
            for probe in probes
        ]
    )
    base_s, per_model_s, per_row_s, beyond_s = _nonnegative(features, np.array([probe.step_s for probe in probes]))
    has_many = bool(features[:, 3].any())
    return StepCosts(base_s, per_model_s, per_row_s, cheap_rows, beyond_s if has_many else None)


def fit_neighbours(crowded: Sequence[Probe], step: StepCosts) -> tuple[float, float]:
    """How much longer, as parts, reading weights and all else of a step take while all replicas of the host step."""
    reading_s = [step.per_model_s * probe.num_models for probe in crowded]
    whole_s = [step.step_s(probe.num_models, round(probe.num_rows)) for probe in crowded]
    features = np.array([(one, whole - one) for one, whole in zip(reading_s, whole_s, strict=True)])
    reading, rest = _nonnegative(features, np.array([probe.step_s for probe in crowded]))
    return max(0.0, reading - 1), max(0.0, rest - 1)


def fit_requests(probes: Sequence[Probe], step: StepCosts) -> tuple[float, float]:
    """What a request takes beside the engine while no replica steps, and while all do."""
    idle_s = max(0.0, statistics.median(p.request_s(step) for p in probes if not p.busy))
    more_s = [(probe.request_s(step) - idle_s) / probe.busy for probe in probes if probe.busy]
    return idle_s, idle_s + max(0.0, statistics.median(more_s)) if more_s else idle_s


def _nonnegative(features: NDArray[np.float64], measured: NDArray[np.float64]) -> list[float]:
    """Weights that give `measured`, the least wrong in relation to it; those that would be negative are 0."""
    used = list(range(features.shape[1]))
    scaled = features / measured[:, None]
    while True:
        weights = _least_deviations(scaled[:, used])
        if (weights >= 0).all():
            found = np.zeros(features.shape[1])
            found[used] = weights
            return [float(weight) for weight in found]
        used.pop(int(weights.argmin()))


def _least_deviations(features: NDArray[np.float64]) -> NDArray[np.float64]:
    """Weights whose sums are all as near to 1 as can be, by least squares that are weighted anew."""
    trust = np.ones(len(features))
    for _ in range(30):
        weights, *_ = np.linalg.lstsq(features * trust[:, None], trust)
        trust = 1 / np.sqrt(np.maximum(np.abs(features @ weights - 1), 1e-4))
    return np.asarray(weights)


def _median_error(step: StepCosts, probes: Sequence[Probe]) -> float:
    return statistics.median(abs(step.step_s(p.num_models, round(p.num_rows)) / p.step_s - 1) for p in probes)


async def _prompt_cost(prober: Prober) -> float:
    """Seconds for each further token of a prompt: two lengths in turns, by one client each in its own time."""
    index = prober.at_home(0)[0]
    short = await prober.ask([_flow("short", index, 1, tokens=2, prompt=1)])
    long = await prober.ask([_flow("long", index, 1, tokens=2, prompt=24)])
    further = statistics.fmean(r.prompt_tokens for r in long) - statistics.fmean(r.prompt_tokens for r in short)
    longer_s = statistics.median(r.ttft_s or 0.0 for r in long) - statistics.median(r.ttft_s or 0.0 for r in short)
    return max(0.0, longer_s / further) if further > 0 else 0.0


async def _probe_neighbours(prober: Prober, room: int) -> list[Probe]:
    """All replicas busy alike; none if there is but one."""
    seats = range(prober.num_replicas)
    shapes = [(models, texts) for models, texts in ((1, 2), (1, 8), (3, 2), (4, 1)) if models <= room]
    if len(seats) == 1:
        return []
    return [await prober.probe(*shape, seats) for _ in range(_ROUNDS) for shape in shapes]


async def _with_loads(prober: Prober, costs: Costs, judge: Judge) -> Costs:
    """One client that asks for each model in turn finds none of them in memory."""
    step = costs.step
    everyone = Models(count=len(prober.homes), popularity="distinct")
    one_by_one = replace(_flow("cold", 0, 1, tokens=2), models=everyone)
    cold = await prober.ask([one_by_one])
    expected_s = costs.request_s + step.step_s(1, 1)

    def load_s(tier: str, otherwise: float) -> float:
        waits = [
            (r.ttft_s or 0.0) - expected_s - step.per_prompt_token_s * (r.prompt_tokens - 1)
            for r in cold
            if r.tier == tier
        ]
        return (
            judge.choose(f"loads from {tier}", statistics.median(waits), 1e-4, 60.0, otherwise) if waits else otherwise
        )

    host_s = load_s("host", costs.load.host_s)
    load = replace(costs.load, host_s=host_s, disk_s=load_s("disk", max(costs.load.disk_s, host_s)))
    tiers = {tier: sum(r.tier == tier for r in cold) for tier in ("device", "host", "disk", "hub")}
    told_s = statistics.median(r.load_s or 0.0 for r in cold)
    counts = {f"cold_probes_{tier}": float(n) for tier, n in tiers.items()}
    return replace(costs, load=load, fit={**costs.fit, **counts, "told_load_s": told_s})


async def _with_busy_loads(prober: Prober, costs: Costs, judge: Judge) -> Costs:
    """One client that asks for each model of a replica in turn, while two texts are written at each replica."""
    homes = [prober.at_home(seat) for seat in range(prober.num_replicas)]
    names = [prober.name(index) for index in homes[0]]
    others = Models(first=1, count=len(names) - 1, popularity="distinct")
    warm = [_flow("warm-0", 0, 2)]
    for seat, home in enumerate(homes[1:], start=1):
        warm.append(_flow(f"warm-{seat}", len(names), 2))
        names.append(prober.name(home[0]))
    answered = await prober.ask([*warm, replace(_flow("cold", 0, 1, tokens=2), models=others)], names)
    waits = [record.load_s for record in answered if record.flow == "cold" and record.load_s]
    if not waits or not costs.fit["told_load_s"]:
        return costs
    longer = max(0.0, statistics.median(waits) / costs.fit["told_load_s"] - 1)
    longer = judge.choose("loads while_busy", longer, 0.0, MOST_LONGER, costs.load.while_busy)
    return replace(costs, load=replace(costs.load, while_busy=longer))


async def _with_loading(prober: Prober, costs: Costs, judge: Judge) -> Costs:
    """Two texts of a model in memory, while two clients have the others of their replica loaded one after another."""
    step, names = costs.step, [prober.name(index) for index in prober.at_home(0)]
    alone = await prober.probe(1, 2)
    others = Models(first=1, count=len(names) - 1, popularity="distinct")
    cold = replace(_flow("cold", 0, 2, tokens=2), models=others)
    answered = await prober.ask([_flow("warm", 0, 2), cold], names)
    warm = [record for record in answered if record.flow == "warm" and record.tier == "device"]
    loads = [record for record in answered if record.flow == "cold"]
    if not warm or not loads:
        return costs
    step_s = statistics.median((r.ended_s - (r.first_s or 0)) / (r.output_tokens - 1) for r in warm)
    loading = statistics.fmean((record.load_s or 0.0) / record.took_s for record in loads)
    part = 1 - (1 - min(1.0, loading)) ** 2  # of the time, when one of the two loads or both do
    span_s = max(r.ended_s for r in loads) - min(r.at_s for r in loads)
    joined = 2 * step_s * len(loads) / span_s  # of the steps, those with a text of theirs in them
    expected_s = alone.step_s + joined * (step.per_model_s + step.per_row_s)
    slower = max(0.0, (step_s / expected_s - 1) / part) if part else step.while_loading
    slower = judge.choose("while_loading", slower, 0.0, MOST_SLOWER, step.while_loading)
    return replace(costs, step=replace(step, while_loading=slower))


def _flow(name: str, index: int, clients: int, *, tokens: int = _TOKENS, prompt: int = 1) -> Flow:
    return Flow(
        name=name,
        arrivals=Arrivals(process="closed", clients=clients),
        models=Models(count=1, first=index, popularity="identical"),
        requests=Requests(
            prompt_tokens=Lengths(like_tweets=False, least=prompt, most=prompt),
            output_tokens=Lengths(like_tweets=False, least=tokens, most=tokens),
        ),
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Prints the costs as JSON, for `plan-capacity --device FILE`."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("url")
    parser.add_argument("--models", action="append", default=[], help="ids, or what they begin with and '*'")
    parser.add_argument("--like", default="cpu", help="costs for what no probe can show")
    parser.add_argument("--probe-s", type=float, default=1.6)
    arguments: Any = parser.parse_args(argv)
    costs = asyncio.run(
        calibrate(arguments.url, arguments.models, like=PRESETS[arguments.like], probe_s=arguments.probe_s)
    )
    sys.stdout.write(costs.to_json() + "\n")


if __name__ == "__main__":
    main()
