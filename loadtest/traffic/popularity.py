"""Which of the models each request asks for, as an index from 0, the most popular first. It knows no ids."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from loadtest.traffic.plan import Models

Floats: TypeAlias = NDArray[np.float64]
Ints: TypeAlias = NDArray[np.int64]
Chooser: TypeAlias = Callable[[Floats], Ints]


def choose_models(models: Models, rng: np.random.Generator) -> Chooser:
    """A function of arrival times (n,), in seconds and in order, to indexes of models; `distinct` goes on where it was.

    The time matters to `churning` alone. Memory and the first call take O(count), then a request O(log count).
    """
    assert models.times_fit is None, "to be resolved before"
    choose = _CHOOSERS[models.popularity](models, rng)
    return lambda times: models.first + choose(times)


def _identical(models: Models, rng: np.random.Generator) -> Chooser:
    return lambda times: np.zeros(len(times), dtype=np.int64)


def _uniform(models: Models, rng: np.random.Generator) -> Chooser:
    return lambda times: rng.integers(models.count, size=len(times))


def _zipf(models: Models, rng: np.random.Generator) -> Chooser:
    choose = _ranks(models.count, models.exponent, rng)
    return lambda times: choose(len(times))


def _distinct(models: Models, rng: np.random.Generator) -> Chooser:
    num_chosen = 0

    def choose(times: Floats) -> Ints:
        nonlocal num_chosen
        indexes = np.arange(num_chosen, num_chosen + len(times)) % models.count
        num_chosen += len(times)
        return indexes

    return choose


def _churning(models: Models, rng: np.random.Generator) -> Chooser:
    """The favourites of each `churn_s` seconds are the next so many models, round and round."""
    favourites = min(models.favourites, models.count)
    choose = _ranks(favourites, models.exponent, rng)
    return lambda times: ((times // models.churn_s).astype(np.int64) * favourites + choose(len(times))) % models.count


def _ranks(count: int, exponent: float, rng: np.random.Generator) -> Callable[[int], Ints]:
    """Ranks from 0 with weights (rank + 1) ** -exponent."""
    cumulative = np.cumsum(np.arange(1, count + 1, dtype=np.float64) ** -exponent)
    return lambda size: np.searchsorted(cumulative, rng.random(size) * cumulative[-1], side="right").astype(np.int64)


_CHOOSERS: dict[str, Callable[[Models, np.random.Generator], Chooser]] = {
    "identical": _identical,
    "zipf": _zipf,
    "uniform": _uniform,
    "distinct": _distinct,
    "churning": _churning,
}
