"""Which replica a model is at home on, so that N replicas act as one cache of models.

`rank` is a pure function; `ModelAffinityRouter` applies it to what Ray Serve knows. Rendezvous hashing gives each
model an order of replicas that hardly changes when one comes or goes. A hot model spills from its home to its
second and third replica once the home carries more than its share. Load is counted in texts, not in requests, of
which one may ask for a hundred.
"""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from hashlib import blake2b
from typing import Any

from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

from deployments.assignment import is_silent, note_queued, note_replicas, note_sent, note_taken
from serve.types import GenerationRequest

BOUND = 1.5  # a home may carry this many times the mean load; 1: no affinity under load, large: no spilling
# Below this many texts a replica counts as free, whatever the mean: more texts of a model whose weights are read anyway
# cost a step little (on two cores 16 take twice as long as one), while a second copy costs memory and a load. Lower,
# chance alone makes a few requests in a hundred spill at such loads, and each pushes a model out.
SPARE_LOAD = 16
_SENT_WITHIN_S = 1.0  # after it was routed; a few milliseconds as a rule
SEAT = "seat"  # in a replica's metadata: which of N it is; who replaces a dead one takes over its seat, and its models


def rank(model_id: str, replicas: Sequence[str], load: Mapping[str, int], *, bound: float) -> list[list[str]]:
    """Replicas to try for `model_id`, best first, one a rank; those over `bound` times the mean load come last.

    `load` counts texts under way, 0 where nothing is known. The order of `replicas` does not matter.
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


def seats(metadata: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """Replica id -> the name that it is ranked under: its seat, or the id where it has none or another holds it.

    Seats are given when a replica starts and never taken back, so after a change of their number two may hold one.
    """
    names: dict[str, str] = {}
    for replica in sorted(metadata):
        seat = metadata[replica].get(SEAT)
        name = replica if seat is None else f"seat {seat}"
        names[replica] = replica if name in names.values() else name
    return names


class ModelAffinityRouter(RequestRouter):  # type: ignore[misc]  # Ray comes without types
    """Routes a `GenerationRequest` to its model's home; calls without one go to the least loaded replica."""

    def initialize_state(self, bound: float = BOUND) -> None:
        self._bound = bound
        # Texts of each request that this router sent and that has not ended.
        self._ours: defaultdict[ReplicaID, dict[str, int]] = defaultdict(dict)
        # Request id -> where it is about to go. Requests that come together are all routed before the first is sent
        # and Ray counts it: without this they would all find the same replica free.
        self._about_to_go: dict[str, tuple[ReplicaID, int, float]] = {}

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
        names = seats({replica.replica_id.unique_id: replica.replica_metadata for replica in candidate_replicas})
        by_name = {names[replica.replica_id.unique_id]: replica for replica in candidate_replicas}
        request_id, now = pending_request.metadata.internal_request_id, time.monotonic()
        self._forget_chosen(request_id, now - _SENT_WITHIN_S)
        load = {name: self._load(replica.replica_id) for name, replica in by_name.items()}
        ranks = [by_name[name] for (name,) in rank(model_id, [*by_name], load, bound=self._bound)]
        ranks.sort(key=lambda replica: is_silent(replica.replica_id.unique_id))  # who hangs comes last
        if ranks:
            self._about_to_go[request_id] = ranks[0].replica_id, _num_texts(pending_request.args), now
        return [[replica] for replica in ranks]

    async def _choose_replica_for_request(
        self, pending_request: PendingRequest, *, is_retry: bool = False
    ) -> RunningReplica:
        """Ray's queue: a request is in here, in the context of its call, until it is sent."""
        note_queued()
        replica = await super()._choose_replica_for_request(pending_request, is_retry=is_retry)
        note_sent(replica.replica_id.unique_id)
        return replica

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: object) -> None:
        """Ray's hook: the replica has taken the request."""
        request_id = pending_request.metadata.internal_request_id
        note_taken(replica_id.unique_id)
        self._about_to_go.pop(request_id, None)
        self._ours[replica_id][request_id] = _num_texts(pending_request.args)

    def on_request_completed(self, replica_id: ReplicaID, internal_request_id: str) -> None:
        """Ray's hook: the request has ended, however it did."""
        self._ours[replica_id].pop(internal_request_id, None)

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        """Ray's hook: these replicas are there, and no others."""
        super().update_replicas(replicas)
        note_replicas({replica.replica_id.unique_id for replica in replicas})
        for gone in self._ours.keys() - {replica.replica_id for replica in replicas}:
            del self._ours[gone]

    def _load(self, replica_id: ReplicaID) -> int:
        """Texts under way. Ray counts the requests of all gateways; what they are worth is known of our own alone."""
        num_requests, ours = self.replica_queue_len_cache.get(replica_id), self._ours[replica_id]
        if num_requests == 0:  # then none of ours is left: a very short one may have ended before it was "routed"
            ours.clear()
        coming = sum(texts for replica, texts, _ in self._about_to_go.values() if replica == replica_id)
        return max(0, (num_requests or 0) - len(ours)) + sum(ours.values()) + coming

    def _forget_chosen(self, request_id: str, before: float) -> None:
        """This request, which is being routed anew, and old ones: whoever left before the sending is not told of."""
        self._about_to_go.pop(request_id, None)
        while self._about_to_go and next(iter(self._about_to_go.values()))[2] < before:
            del self._about_to_go[next(iter(self._about_to_go))]


def _model_of(args: Sequence[Any]) -> str | None:
    """The model's id as all spellings of it share it: case and revision do not decide where it lives."""
    if not args or not isinstance(args[0], GenerationRequest):
        return None
    return args[0].model_id.partition("@")[0].lower()


def _num_texts(args: Sequence[Any]) -> int:
    if not args or not isinstance(args[0], GenerationRequest):
        return 1
    return len(args[0].prompts) * args[0].num_choices
