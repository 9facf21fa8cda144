"""Which replica a request goes to: the service's own rule, written again for millions of requests.

Rendezvous hashing with bounded load; loads are counted in texts under way. It must choose as `deployments.router.rank`
does, which a test compares.
Source: D. Thaler and C. Ravishankar, rendezvous hashing (1998); V. Mirrokni et al., consistent hashing with bounded
loads (2016).
"""

from __future__ import annotations

import math
from collections import OrderedDict
from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray

BOUND = 1.5
SPARE_LOAD = 16

_EXACT = 64  # replicas; with more, a hash that numpy computes for all of them at once stands in for the service's
_TOP = 8  # of a long order: only hot models ask for who comes after
_MOST_WHOLE = 512  # long orders that are kept


def order(model: str, num_replicas: int) -> list[int]:
    """The replicas, by their seats, that `model` prefers, most preferred first."""
    weights = [
        blake2b(f"{model.lower()}\nseat {seat}".encode(), digest_size=8).digest() for seat in range(num_replicas)
    ]
    return sorted(range(num_replicas), key=weights.__getitem__, reverse=True)


class Router:
    """Chooses among `num_replicas`, whose loads its user keeps in `load` and `total`."""

    def __init__(self, names: list[str], num_replicas: int, *, bound: float = BOUND) -> None:
        """`names`: of the models, by their index."""
        self.load = [0] * num_replicas
        self.total = 0
        self._names = names
        self._bound = bound / num_replicas
        self._orders: list[list[int] | None] = [None] * len(names)
        self._whole: OrderedDict[int, list[int]] = OrderedDict()  # of hot models, the last asked last
        self._seats = np.arange(num_replicas, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)

    def preferred(self, model: int) -> list[int]:
        """The first replicas of the model's order: all of them, or the first few of many."""
        found = self._orders[model]
        if found is None:
            if len(self.load) <= _EXACT:
                found = order(self._names[model], len(self.load))
            else:
                weights = self._weights(model)
                top = np.argpartition(weights, -_TOP)[-_TOP:]
                found = [int(seat) for seat in top[np.argsort(weights[top])[::-1]]]
            self._orders[model] = found
        return found

    def choose(self, model: int, is_full: list[bool] | None = None) -> int:
        """The replica that the service would try first among those not full; -1 where all are full."""
        load = self.load
        limit = max(SPARE_LOAD, math.ceil(self._bound * (1 + self.total)))
        preferred = self._orders[model] or self.preferred(model)
        for seat in preferred:
            if load[seat] < limit and not (is_full and is_full[seat]):
                return seat
        if len(preferred) < len(load):
            preferred = self._whole_order(model)
            for seat in preferred:
                if load[seat] < limit and not (is_full and is_full[seat]):
                    return seat
        free = [seat for seat in preferred if not (is_full and is_full[seat])]
        return min(free, key=load.__getitem__, default=-1)

    def _whole_order(self, model: int) -> list[int]:
        found = self._whole.pop(model, None)
        if found is None:
            found = [int(seat) for seat in np.argsort(self._weights(model))[::-1]]
            if len(self._whole) >= _MOST_WHOLE:
                self._whole.popitem(last=False)
        self._whole[model] = found
        return found

    def _weights(self, model: int) -> NDArray[np.uint64]:
        # splitmix64 of model and seat. Source: G. Steele et al., fast splittable pseudorandom number generators (2014).
        with np.errstate(over="ignore"):
            mixed = self._seats ^ (np.uint64(model + 1) * np.uint64(0xBF58476D1CE4E5B9))
            mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            weights: NDArray[np.uint64] = mixed ^ (mixed >> np.uint64(31))
        return weights
