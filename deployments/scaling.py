"""How many replicas are wanted, by what their fellows tell: texts and bytes of models, streams, jobs.

`Scaling` is what an application's YAML names as its `autoscaling_policy`. Ray Serve calls it in its controller, ten
times a second, and applies limits and delays itself (`deployments.app`). Nothing here reads, asks or waits: replicas
send their figures every few seconds, as numbers (`record_autoscaling_stats`).

    generators   as many as write the texts at hand, and as hold the models asked for within the last minutes: a fleet
                 that loads again and again what it has just evicted has short queues, and is too small nonetheless
    gateways     by requests under way
    trainers     by jobs that run or wait, which gateways count: where there is no trainer, none can tell

NOTE: Ray pickles this module by value into a process that need not have what replicas have: it imports little.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

JOBS = "jobs"  # what gateways tell

# Of its places in the batch, and of its memory, that a generator uses well: the rest is for what comes in the minutes
# until there is another one, and for models that hashing does not spread evenly.
_TEXTS_FILL = 0.8
_BYTES_FILL = 0.85
# One fewer only where those that stay would then use less than this of what they use well: else the next request more
# brings it back, and all its models are loaded a third time.
_SHRINK_BELOW = 0.7
_EVERY_S = 1.0  # figures are seconds old anyway


@dataclass(frozen=True, slots=True)
class GeneratorLoad:
    """What one generator tells."""

    texts: float  # being written, waiting for a place in the batch, or for their model
    places: float  # in the batch
    asked_bytes: float  # of the models asked for within the last `window_s`, in memory or not
    budget_bytes: float
    window_s: float

    def to_stats(self) -> dict[str, float]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Need:
    """There is `demand`, of which one replica takes `each`."""

    demand: float
    each: float

    @property
    def fewest(self) -> int:
        return math.ceil(self.demand / self.each)

    @property
    def most(self) -> int:
        """That would not soon be too few again if there were one fewer."""
        return math.ceil(self.demand / (self.each * _SHRINK_BELOW))


def wanted(have: int, needs: Iterable[Need]) -> int:
    """As many as all `needs` ask for; `have`, while that is neither too few nor too many. Never less than 1."""
    needs = list(needs)
    fewest = max((need.fewest for need in needs), default=1)
    most = max((need.most for need in needs), default=1)
    return max(1, fewest, min(have, most))


def wanted_generators(
    have: int, loads: Sequence[GeneratorLoad], *, queued: float = 0.0, moved_bytes: float = 0.0
) -> int:
    """`queued`: requests that no generator has taken yet. What was there stays where nothing is known.

    A model is at home on one generator, so that sums over them count it once; but `moved_bytes` of them are still
    counted by the generator that they were at home on before.
    """
    if not loads:
        return have
    num_texts = queued + sum(load.texts for load in loads)
    num_bytes = max(0.0, sum(load.asked_bytes for load in loads) - moved_bytes)
    texts = Need(num_texts, _TEXTS_FILL * _mean(load.places for load in loads))
    memory = Need(num_bytes, _BYTES_FILL * _mean(load.budget_bytes for load in loads))
    return wanted(have, [texts, memory])


class Moves:
    """Bytes of models that went to new generators, while their old ones still count them."""

    def __init__(self) -> None:
        self._num_generators = 0
        self._moved: list[tuple[float, float]] = []  # when, and how many bytes

    def update(self, now: float, num_generators: int, loads: Sequence[GeneratorLoad]) -> float:
        """What is counted twice at most: of n generators, a new one takes over an nth of the models of all."""
        window_s = max((load.window_s for load in loads), default=0.0)
        self._moved = [(at, num_bytes) for at, num_bytes in self._moved if now - at <= window_s]
        if 0 < self._num_generators < num_generators:
            share = (num_generators - self._num_generators) / num_generators
            once = sum(load.asked_bytes for load in loads) - self.num_bytes
            self._moved.append((now, max(0.0, share * once)))
        self._num_generators = num_generators
        return self.num_bytes

    @property
    def num_bytes(self) -> float:
        return sum(num_bytes for _, num_bytes in self._moved)


class Scaling:
    """The policy of the whole application. `clock`: seconds, at the pace of Ray's."""

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._decided: dict[Any, float] = {}
        self._decided_at = -math.inf
        self._moves = Moves()

    def __call__(self, contexts: Mapping[Any, Any]) -> tuple[dict[Any, float], dict[Any, dict[str, Any]]]:
        """Ray's contexts by deployment -> how many replicas; a deployment that is left out stays as it is."""
        if self._clock() - self._decided_at >= _EVERY_S or not self._decided.keys() <= contexts.keys():
            self._decided = self._decide(contexts)
            self._decided_at = self._clock()
        return dict(self._decided), {}

    def _decide(self, contexts: Mapping[Any, Any]) -> dict[Any, float]:
        by_name = {context.deployment_name: context for context in contexts.values()}
        numbers: dict[str, int | None] = {}
        if gateways := by_name.get("gateway"):
            streams = Need(gateways.total_num_requests, gateways.config.get_target_ongoing_requests())
            numbers["gateway"] = wanted(gateways.target_num_replicas, [streams])
            numbers["trainer"] = latest(gateways, JOBS)
        if generators := by_name.get("generator"):
            numbers["generator"] = self._generators(generators)
        found = {key: numbers.get(context.deployment_name) for key, context in contexts.items()}
        return {key: number for key, number in found.items() if number is not None}

    def _generators(self, context: Any) -> int:
        loads = loads_of(context)
        moved_bytes = self._moves.update(self._clock(), context.current_num_replicas, loads)
        return wanted_generators(
            context.target_num_replicas, loads, queued=context.total_queued_requests, moved_bytes=moved_bytes
        )


def every_one(context: Any) -> tuple[int, dict[str, Any]]:
    """The policy of trainers where the application has none: nobody counts jobs, and they must run."""
    return context.capacity_adjusted_max_replicas, {}


def loads_of(context: Any) -> list[GeneratorLoad]:
    """Of each generator that has told: its texts as their mean over Ray's look-back, all else as it was last told."""
    told: Mapping[str, Mapping[Any, Sequence[Any]]] = context.raw_metrics
    names = [field.name for field in fields(GeneratorLoad)]
    complete = [one for one in told.get("texts", {}) if all(told.get(name, {}).get(one) for name in names)]
    loads = []
    for one in complete:
        figures = {name: told[name][one][-1].value for name in names}
        figures["texts"] = _mean(point.value for point in told["texts"][one])
        loads.append(GeneratorLoad(**figures))
    return loads


def latest(context: Any, name: str) -> int | None:
    """The figure that all replicas see alike, as it was told last; None where none has told of late."""
    points = [series[-1] for series in context.raw_metrics.get(name, {}).values() if series]
    return int(max(points, key=lambda point: point.timestamp).value) if points else None


def _mean(values: Iterable[float]) -> float:
    values = list(values)
    return sum(values) / len(values)
