"""Which replica a model is at home on, so that N replicas act as one cache of models.

`rank` is a pure function; `ModelAffinityRouter` applies it to what Ray Serve knows. Rendezvous hashing gives each
model an order of replicas that hardly changes when one comes or goes. A hot model spills from its home to its
second and third replica once the home carries more than its share.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from hashlib import blake2b
from typing import Any

from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica

from serve.types import GenerationRequest

BOUND = 1.5  # a home may carry this many times the mean load; 1: no affinity under load, large: no spilling
# Below this many requests a replica counts as free, whatever the mean: more texts of a model whose weights are read
# anyway cost a step next to nothing up to about 8, while a second copy of the model costs memory and a load.
SPARE_LOAD = 8


def rank(model_id: str, replicas: Sequence[str], load: Mapping[str, int], *, bound: float) -> list[list[str]]:
    """Replicas to try for `model_id`, best first, one a rank; those over `bound` times the mean load come last.

    `load` counts ongoing requests, 0 where nothing is known. The order of `replicas` does not matter.
    Source: D. Thaler and C. Ravishankar, rendezvous hashing (1998); V. Mirrokni et al., consistent hashing with
    bounded loads (2016).
    """
    if not replicas:
        return []
    by_preference = sorted(replicas, key=lambda replica: _weight(model_id, replica), reverse=True)
    mean = (1 + sum(load.get(replica, 0) for replica in replicas)) / len(replicas)  # with this request
    limit = max(SPARE_LOAD, math.ceil(bound * mean))
    fitting = [replica for replica in by_preference if load.get(replica, 0) < limit]
    crowded = [replica for replica in by_preference if load.get(replica, 0) >= limit]
    return [[replica] for replica in fitting + sorted(crowded, key=lambda replica: load.get(replica, 0))]


def _weight(model_id: str, replica: str) -> bytes:
    # Ids are ASCII without control characters, so the separator keeps ("ab", "c") and ("a", "bc") apart.
    return blake2b(f"{model_id}\n{replica}".encode(), digest_size=8).digest()


class ModelAffinityRouter(RequestRouter):  # type: ignore[misc]  # Ray comes without types
    """Routes a `GenerationRequest` to its model's home; calls without one go to the least loaded replica."""

    def initialize_state(self, bound: float = BOUND) -> None:
        self._bound = bound

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Ray tries the ranks in order and passes over replicas that are full or do not answer."""
        if pending_request is None:
            return [candidate_replicas]
        pending_request.routing_context.should_backoff = True  # between rounds over all ranks, not between ranks
        model_id = _model_of(pending_request.args)
        if model_id is None:
            return [candidate_replicas]
        by_name = {replica.replica_id.unique_id: replica for replica in candidate_replicas}
        cache = self.replica_queue_len_cache
        load = {name: cache.get(replica.replica_id) or 0 for name, replica in by_name.items()}
        return [[by_name[name] for name in names] for names in rank(model_id, [*by_name], load, bound=self._bound)]


def _model_of(args: Sequence[Any]) -> str | None:
    """The model's id as all spellings of it share it: case and revision do not decide where it lives."""
    if not args or not isinstance(args[0], GenerationRequest):
        return None
    return args[0].model_id.partition("@")[0].lower()
