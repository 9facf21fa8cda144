"""Requests as columns: when, which model, how long. From a plan's calls, or drawn for a rate and a popularity.

Of large traffic a slice stands for the whole: what a tenth of the replicas get of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from loadtest.results.record import Record
from loadtest.traffic.plan import Call

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Workload:
    """A request a row, in the order of arrival. `model` is an index of `names`."""

    at_s: Floats
    model: Ints
    prompt_tokens: Ints
    output_tokens: Ints  # of each of its texts
    num_choices: Ints
    names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.at_s)

    @property
    def num_tokens(self) -> int:
        return int((self.output_tokens * self.num_choices).sum())


@dataclass(frozen=True, slots=True)
class Traffic:
    """What plan-capacity is asked about. `spread` is the standard deviation of lengths over their mean."""

    rate: float  # requests a second
    num_models: int
    exponent: float = 1.0  # of Zipf's law; 0: all models alike
    tokens: float = 30.0
    prompt_tokens: int = 4
    spread: float = 0.5


def draw(
    traffic: Traffic, *, duration_s: float, seed: int = 1, part: float = 1.0, spread_from: float = 0.0
) -> Workload:
    """Poisson arrivals for `duration_s`; the same seed gives the same requests.

    `part` of it alone: models with at least `spread_from` of all requests come with that part of theirs, as they are
    spread over many replicas; of the others so many models come, with all of theirs, as each is at home on one.
    """
    rng = np.random.default_rng(seed)
    num = int(rng.poisson(traffic.rate * part * duration_s))
    shares = np.cumsum(_sliced(_popularity(traffic), part, spread_from))
    shape = 1 / traffic.spread**2 if traffic.spread else 0.0
    lengths = rng.gamma(shape, traffic.tokens / shape, num) if shape else np.full(num, traffic.tokens)
    return Workload(
        at_s=np.sort(rng.uniform(0, duration_s, num)),
        model=np.searchsorted(shares, rng.uniform(0, shares[-1], num)).astype(np.int64),
        prompt_tokens=np.full(num, traffic.prompt_tokens, dtype=np.int64),
        output_tokens=np.maximum(1, np.rint(lengths)).astype(np.int64),
        num_choices=np.ones(num, dtype=np.int64),
        names=tuple(f"bots/m{index}" for index in range(traffic.num_models)),
    )


def _popularity(traffic: Traffic) -> Floats:
    weights = np.arange(1, traffic.num_models + 1, dtype=np.float64) ** -traffic.exponent
    return np.asarray(weights / weights.sum())


def _sliced(shares: Floats, part: float, spread_from: float) -> Floats:
    """Weights of the same models, of which most are 0; the others have their part of the head and of the tail."""
    if part >= 1:
        return shares
    head = int(np.searchsorted(-shares, -spread_from, side="right"))  # the most popular come first
    ranks = np.arange(len(shares) - head + 1)
    is_kept = np.diff(np.floor(ranks * part + 0.5)) > 0  # one in so many, all along the tail
    tail = np.where(is_kept, shares[head:], 0.0)
    if tail.any():
        tail *= part * shares[head:].sum() / tail.sum()
    return np.concatenate([shares[:head] * part, tail])


def of_calls(
    calls: Sequence[Call], count_tokens: Callable[[str], int] = lambda prompt: max(1, len(prompt.split()))
) -> Workload:
    """The calls of a plan. A call whose client hangs up counts as if it stayed.

    `count_tokens`: of a prompt; `loadtest.traffic.texts` writes one a word.
    """
    calls = sorted(calls, key=lambda call: call.at_s)
    index = {name: number for number, name in enumerate(dict.fromkeys(call.model for call in calls))}
    return Workload(
        at_s=np.array([call.at_s for call in calls], dtype=np.float64),
        model=np.array([index[call.model] for call in calls], dtype=np.int64),
        prompt_tokens=np.array([count_tokens(call.prompt) for call in calls], dtype=np.int64),
        output_tokens=np.array([max(1, call.num_tokens) for call in calls], dtype=np.int64),
        num_choices=np.array([call.num_choices for call in calls], dtype=np.int64),
        names=tuple(index),
    )


def of_records(records: Sequence[Record]) -> Workload:
    """What a run asked for, again; what was not answered in full counts with the tokens that it got."""
    records = sorted((record for record in records if record.kind == "generate"), key=lambda record: record.at_s)
    index = {name: number for number, name in enumerate(dict.fromkeys(record.model for record in records))}
    return Workload(
        at_s=np.array([record.at_s for record in records], dtype=np.float64),
        model=np.array([index[record.model] for record in records], dtype=np.int64),
        prompt_tokens=np.array([max(1, record.prompt_tokens) for record in records], dtype=np.int64),
        output_tokens=np.array(
            [max(1, record.output_tokens // record.num_choices) for record in records], dtype=np.int64
        ),
        num_choices=np.array([record.num_choices for record in records], dtype=np.int64),
        names=tuple(index),
    )
