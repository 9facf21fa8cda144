"""A discrete-event model of N replicas: router, pools, steps. It replays a workload with given costs.

There is an event for each arrival, end of a load, joining and finish, none for a token: a replica's texts all advance
one token a step, so a replica counts its steps (a real number, by the time that passed), and a text of L tokens that
joins at step s ends at step s + L. What a step takes changes only when somebody joins or leaves.

What it leaves out: the scheduler's fairness between callers and models (texts of a hot model may sit steps out); what
unloading takes; clients that hang up; failures; that nobody waits longer than `lease_timeout_s` for weights; that an
idle model which was loaded for nobody is spared for `min_residency_s`. Who loads is in line for room from its arrival
on, in the service from when its file has been looked at.
"""

from __future__ import annotations

import math
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass
from heapq import heappop, heappush
from typing import Any

import numpy as np

from loadtest.capacity.costs import Costs
from loadtest.capacity.routing import BOUND, Router
from loadtest.capacity.workload import Floats, Ints, Workload

TIERS = ("device", "host", "disk", "hub")
_DEVICE = 0
REFUSED = -1  # in `Outcome.tier`
QUEUED_AT_GATEWAY = 64  # as `deployments.app` has it


@dataclass(frozen=True, slots=True)
class Cluster:
    """So many replicas of `costs`, and how many requests may wait for them."""

    costs: Costs
    num_replicas: int
    bound: float = BOUND  # of a replica's load over the mean
    max_ongoing: int = 256  # requests that a replica takes, running or waiting
    max_queued: int | None = None  # beyond those, at the gateways; then they are refused. None: 64 for each host's one
    is_warm: bool = False  # the models asked most often are in memory when it begins

    @property
    def num_hosts(self) -> int:
        return -(-self.num_replicas // self.costs.replicas_per_host)

    @property
    def num_queued(self) -> int:
        """How many requests may wait at all gateways."""
        return self.num_hosts * QUEUED_AT_GATEWAY if self.max_queued is None else self.max_queued


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of each request of the workload; times are seconds from the start, NaN where it was refused."""

    workload: Workload
    cluster: Cluster
    first_s: Floats
    ended_s: Floats
    load_s: Floats  # what it waited for the weights
    tier: Ints  # index of `TIERS`, or `REFUSED`
    replica: Ints
    busy_s: Floats  # of each replica
    loading_s: Floats  # of each replica, its parallel loads added up
    num_steps: float
    num_loads: int
    num_evictions: int
    num_reloads: int  # loads of a model that the same replica had before
    num_events: int


class _Entry:
    """A model in a replica, or on its way in."""

    __slots__ = (
        "asked_s", "is_closed", "is_resident", "is_timed", "leases", "model", "running", "tier", "touched_s", "waiters"
    )  # fmt: skip

    def __init__(self, model: int, now: float) -> None:
        self.model = model
        self.asked_s = self.touched_s = now
        self.is_resident = self.is_closed = False
        self.is_timed = False  # its patience runs
        self.leases = 0  # requests that use it
        self.running = 0  # of their texts, those that step
        self.tier = _DEVICE
        self.waiters: list[int] = []


class _Lru:
    """Which models a host still has; `None` places: all of them."""

    def __init__(self, num_places: int | None) -> None:
        self._num_places = num_places
        self._models: OrderedDict[int, None] = OrderedDict()

    def touch(self, model: int) -> bool:
        """Whether the model was there; now it is."""
        if self._num_places is None:
            return True
        was_there = model in self._models
        self._models[model] = None
        self._models.move_to_end(model)
        if len(self._models) > self._num_places:
            self._models.popitem(last=False)
        return was_there


class _Host:
    """What replicas share: page cache, disk, cores."""

    def __init__(self, costs: Costs) -> None:
        self.page_cache, self.disk = _Lru(costs.host_models), _Lru(costs.disk_models)
        self.replicas: list[_Replica] = []
        self.num_busy = 0
        # What a request takes outside of the engine, and what each replica that steps adds to it.
        busy_s = costs.request_s if costs.request_busy_s is None else costs.request_busy_s
        self.idle_s, self.busy_s = costs.request_s, (busy_s - costs.request_s) / costs.replicas_per_host

    def find(self, model: int) -> int:
        """The tier that the model is loaded from."""
        on_disk = self.disk.touch(model)
        return 1 if self.page_cache.touch(model) else 2 if on_disk else 3


class _World:
    """The clock's queue and the columns that all replicas write to."""

    def __init__(self, workload: Workload, cluster: Cluster) -> None:
        num = len(workload)
        self.costs = cluster.costs
        self.prompt_tokens: list[int] = workload.prompt_tokens.tolist()
        self.output_tokens: list[int] = workload.output_tokens.tolist()
        self.num_choices: list[int] = workload.num_choices.tolist()
        self.model: list[int] = workload.model.tolist()
        self.first_s, self.ended_s, self.load_s = [math.nan] * num, [math.nan] * num, [0.0] * num
        self.request_s = [0.0] * num
        self.tier = [REFUSED] * num
        self.events: list[tuple[float, int, Callable[[float, int, Any], None], Any]] = []
        self.number = 0  # of the last event; orders those of one moment
        rows = range(cluster.costs.max_sequences + int(workload.num_choices.max(initial=1)) + 1)
        self.rows_s = [cluster.costs.step.step_s(0, rows_) for rows_ in rows]
        self.router = Router(list(workload.names), cluster.num_replicas, bound=cluster.bound)
        self.pending: deque[int] = deque()  # requests that found every replica full
        self.is_full = [False] * cluster.num_replicas
        self.replica = [-1] * num
        self.max_ongoing, self.max_queued = cluster.max_ongoing, cluster.num_queued
        hosts = [_Host(cluster.costs) for _ in range(cluster.num_hosts)]
        self.replicas = [
            _Replica(self, seat, hosts[seat // cluster.costs.replicas_per_host]) for seat in range(cluster.num_replicas)
        ]

    def at(self, when_s: float, handler: Callable[[float, int, Any], None], argument: Any) -> int:
        self.number += 1
        heappush(self.events, (when_s, self.number, handler, argument))
        return self.number

    def arrive(self, now: float, request: int) -> None:
        seat = self.router.choose(self.model[request], self.is_full)
        if seat >= 0:
            self.replica[request] = seat
            self.replicas[seat].take(now, request)
        elif len(self.pending) < self.max_queued:
            self.pending.append(request)

    def leave(self, now: float, replica: _Replica, request: int) -> None:
        num_texts = self.num_choices[request]
        self.router.load[replica.seat] -= num_texts
        self.router.total -= num_texts
        replica.num_ongoing -= 1
        self.is_full[replica.seat] = False
        if self.pending:  # NOTE: by an event, as the replica is amid its own bookkeeping
            self.at(now, lambda when, number, waiting: self.arrive(when, waiting), self.pending.popleft())

    def warm_up(self, workload: Workload) -> None:
        """Puts the models asked most often where they are at home, and into the page caches."""
        counts = np.bincount(workload.model, minlength=len(workload.names))
        seen = [int(model) for model in np.argsort(-counts, kind="stable") if counts[model]]
        for model in reversed(seen):  # the most popular last: the least recently used are the others
            self.replicas[self.router.preferred(model)[0]].host.find(model)
        for model in seen:
            self.replicas[self.router.preferred(model)[0]].keep(model)
        for replica in self.replicas:
            for entry in reversed(list(replica.idle)):
                replica.idle.move_to_end(entry)


class _Replica:
    """A pool and an engine."""

    __slots__ = (
        "busy_s", "busy_since_s", "costs", "distinct", "ends", "entries", "free", "has_neighbours", "host", "idle",
        "line", "loading_s", "max_rows", "num_evictions", "num_leaving", "num_loading", "num_loads", "num_ongoing",
        "num_reloads", "num_steps", "per_model_s", "rows", "seat", "seen", "since_s", "step_s", "steps", "turns",
        "waiting", "wake", "wake_steps", "world",
    )  # fmt: skip

    def __init__(self, world: _World, seat: int, host: _Host) -> None:
        self.world, self.seat, self.host, self.costs = world, seat, host, world.costs
        host.replicas.append(self)
        self.num_ongoing = self.num_loads = self.num_evictions = self.num_reloads = 0
        self.busy_s = self.busy_since_s = self.loading_s = self.num_steps = 0.0
        # The pool.
        self.entries: dict[int, _Entry] = {}  # those a new request can join
        self.idle: OrderedDict[_Entry, None] = OrderedDict()  # resident and not used, the least recently used first
        self.free = self.costs.slots
        self.line: deque[_Entry] = deque()  # waiting for room
        self.turns: deque[_Entry] = deque()  # have room, wait for a turn to load
        self.num_loading = 0
        self.num_leaving = 0  # closed, with requests that still use them
        self.seen: set[int] = set()  # models it has had
        # The engine.
        self.max_rows, self.per_model_s = self.costs.max_sequences, self.costs.step.per_model_s
        self.has_neighbours = self.costs.step.slower(1.0) != (1.0, 1.0)
        self.waiting: deque[tuple[int, _Entry]] = deque()
        self.ends: list[tuple[int, int, _Entry]] = []  # heap: step at which it ends, request, its model
        self.rows = self.distinct = 0  # texts that step, and models they are of
        self.steps = 0.0  # done at `since_s`, which lies ahead while prompts are read
        self.since_s = 0.0
        self.step_s = math.inf
        self.wake = 0  # number of the event that is awaited; others are stale
        self.wake_steps = 0

    # --- The pool ---------------------------------------------------------------------------------------------

    def take(self, now: float, request: int) -> None:
        """A request arrives."""
        world = self.world
        num_texts = world.num_choices[request]
        world.router.load[self.seat] += num_texts
        world.router.total += num_texts
        self.num_ongoing += 1
        world.request_s[request] = self.host.idle_s + self.host.busy_s * self.host.num_busy
        if self.num_ongoing >= world.max_ongoing:
            world.is_full[self.seat] = True
        model = world.model[request]
        entry = self.entries.get(model)
        if entry is None:
            self.entries[model] = entry = _Entry(model, now)
            entry.waiters.append(request)
            self.line.append(entry)
            self.make_room(now)
        elif entry.is_resident:
            world.tier[request] = _DEVICE
            if not entry.leases:
                del self.idle[entry]
            self.use(now, request, entry)
        else:
            entry.waiters.append(request)
        if not entry.is_resident:
            world.load_s[request] = now  # until it is loaded: when the wait began

    def use(self, now: float, request: int, entry: _Entry) -> None:
        entry.leases += 1
        entry.touched_s = now
        self.submit(now, request, entry)

    def make_room(self, now: float) -> None:
        """Room for the first in line: a free slot, the least recently used, or in the end one that is in use."""
        while self.line:
            first = self.line[0]
            if self.free:
                self.free -= 1
            elif self.idle:
                victim, _ = self.idle.popitem(last=False)
                del self.entries[victim.model]
                self.num_evictions += 1
            else:
                self.wait_for_room(now, first)
                return
            self.line.popleft()
            self.turns.append(first)
            self.start_loads(now)

    def wait_for_room(self, now: float, first: _Entry) -> None:
        """Nobody is idle. Once patience is over, the least recently leased takes nobody new, and goes with its last."""
        due_s = first.asked_s + self.costs.patience_s
        if now < due_s:
            if not first.is_timed:
                first.is_timed = True
                self.world.at(due_s, self.lose_patience, first)
        elif not self.num_leaving:
            in_use = [entry for entry in self.entries.values() if entry.is_resident]
            if in_use:
                victim = min(in_use, key=lambda entry: entry.touched_s)
                del self.entries[victim.model]
                victim.is_closed = True
                self.num_leaving += 1

    def lose_patience(self, now: float, number: int, first: _Entry) -> None:
        if self.line and self.line[0] is first:
            self.make_room(now)

    def start_loads(self, now: float) -> None:
        while self.turns and self.num_loading < self.costs.parallel_loads:
            entry = self.turns.popleft()
            entry.tier = self.host.find(entry.model)
            took_s = self.costs.load.of(TIERS[entry.tier])
            if self.host.num_busy == len(self.host.replicas):  # before that a core is free
                took_s *= 1 + self.costs.load.while_busy
            self.num_loading += 1
            self.num_loads += 1
            self.num_reloads += entry.model in self.seen
            self.seen.add(entry.model)
            self.loading_s += took_s
            self.world.at(now + took_s, self.end_load, entry)
            if self.num_loading == 1 and self.costs.step.while_loading:
                self.retime(now)

    def end_load(self, now: float, number: int, entry: _Entry) -> None:
        self.num_loading -= 1
        self.start_loads(now)
        if not self.num_loading and self.costs.step.while_loading:
            self.retime(now)
        entry.is_resident = True
        world = self.world
        for request in entry.waiters:
            world.tier[request] = entry.tier
            world.load_s[request] = now - world.load_s[request]
            self.use(now, request, entry)
        entry.waiters = []
        self.make_room(now)

    def keep(self, model: int) -> None:
        """The model is in memory from the start, if there is room."""
        if self.free:
            self.free -= 1
            self.entries[model] = entry = _Entry(model, 0.0)
            entry.is_resident = True
            self.seen.add(model)
            self.idle[entry] = None

    def give_back(self, now: float, entry: _Entry) -> None:
        entry.leases -= 1
        entry.touched_s = now
        if not entry.leases:
            if entry.is_closed:
                self.num_leaving -= 1
                self.num_evictions += 1
                self.free += 1
            else:
                self.idle[entry] = None
        if self.line:
            self.make_room(now)

    # --- The engine -------------------------------------------------------------------------------------------

    def submit(self, now: float, request: int, entry: _Entry) -> None:
        """It joins at the next step."""
        self.waiting.append((request, entry))
        if not self.rows:
            self.since_s = self.busy_since_s = now
            self.host.num_busy += 1
            self.admit(now)
            self.tell_neighbours(now)
        elif self.rows < self.max_rows:
            self.advance(now)
            boundary = math.floor(self.steps + 1e-9) + 1
            if boundary < self.wake_steps:
                self.wake_at(boundary)

    def advance(self, now: float) -> None:
        if now > self.since_s:
            self.steps += (now - self.since_s) / self.step_s
            self.since_s = now

    def wake_at(self, steps: int) -> None:
        world = self.world
        self.wake_steps = steps
        world.number = self.wake = world.number + 1
        heappush(world.events, (self.since_s + (steps - self.steps) * self.step_s, self.wake, self.end_step, steps))

    def retime(self, now: float) -> None:
        """Steps take longer or shorter from now on, though nobody joins or leaves."""
        if self.rows:
            self.advance(now)
            self.set_step_s()
            self.wake_at(self.wake_steps)

    def set_step_s(self) -> None:
        step, host = self.costs.step, self.host
        rest_s, reading_s = self.world.rows_s[self.rows], self.per_model_s * self.distinct
        if self.has_neighbours and host.num_busy > 1:
            reading, rest = step.slower((host.num_busy - 1) / (len(host.replicas) - 1))
            rest_s, reading_s = rest_s * rest, reading_s * reading
        self.step_s = (rest_s + reading_s) * (1 + step.while_loading) if self.num_loading else rest_s + reading_s

    def tell_neighbours(self, now: float) -> None:
        if self.has_neighbours:
            for neighbour in self.host.replicas:
                if neighbour is not self:
                    neighbour.retime(now)

    def end_step(self, now: float, number: int, steps: int) -> None:
        """A step at whose end somebody leaves or may join."""
        if number != self.wake:
            return
        self.steps, self.since_s = float(steps), now
        ends, world = self.ends, self.world
        while ends and ends[0][0] <= steps:
            _, request, entry = heappop(ends)
            num_texts = world.num_choices[request]
            self.rows -= num_texts
            entry.running -= num_texts
            if not entry.running:
                self.distinct -= 1
            world.ended_s[request] = now
            if world.first_s[request] > now:  # was foretold when it joined, and the step went faster
                world.first_s[request] = now
            world.leave(now, self, request)
            self.give_back(now, entry)
        self.admit(now)
        if not self.rows:
            self.busy_s += now - self.busy_since_s
            self.host.num_busy -= 1
            self.tell_neighbours(now)

    def admit(self, now: float) -> None:
        """At the end of a step: those who wait join, as far as rows and a step's prompts go."""
        joined = self.join() if self.waiting else ()
        if not self.rows:
            self.num_steps += self.steps
            self.steps = 0.0
            return
        self.set_step_s()
        if joined:
            world = self.world
            prompts = sum([(world.prompt_tokens[r] - 1) * world.num_choices[r] for r in joined])
            self.since_s = now + prompts * self.costs.step.per_prompt_token_s
            first_s = self.since_s + self.step_s
            for request in joined:
                world.first_s[request] = first_s
        steps = self.ends[0][0]
        if self.waiting and self.rows < self.max_rows:
            steps = min(steps, int(self.steps) + 1)
        self.wake_at(steps)

    def join(self) -> list[int]:
        """Whoever has a place in the next step; a prompt too long for one step counts as one step all the same."""
        world, waiting, steps = self.world, self.waiting, int(self.steps)
        joined: list[int] = []
        budget = max(1, self.costs.max_step_rows - self.rows)
        while waiting:
            request, entry = waiting[0]
            num_texts = world.num_choices[request]
            if (self.rows and self.rows + num_texts > self.max_rows) or budget <= 0:
                break
            waiting.popleft()
            budget -= world.prompt_tokens[request] * num_texts
            if not entry.running:
                self.distinct += 1
            entry.running += num_texts
            self.rows += num_texts
            heappush(self.ends, (steps + world.output_tokens[request], request, entry))
            joined.append(request)
        return joined


def simulate(workload: Workload, cluster: Cluster) -> Outcome:
    """Replays all requests until the last has ended. The same arguments give the same outcome."""
    world = _World(workload, cluster)
    if cluster.is_warm:
        world.warm_up(workload)
    events, arrive, num_handled = world.events, world.arrive, 0
    for request, at_s in enumerate(workload.at_s.tolist()):
        while events and events[0][0] <= at_s:
            when_s, number, handler, argument = heappop(events)
            handler(when_s, number, argument)
            num_handled += 1
        arrive(at_s, request)
    while events:
        when_s, number, handler, argument = heappop(events)
        handler(when_s, number, argument)
        num_handled += 1
    assert not any(replica.num_ongoing for replica in world.replicas) and not world.pending
    replicas, request_s = world.replicas, np.array(world.request_s)
    return Outcome(
        workload=workload,
        cluster=cluster,
        first_s=np.array(world.first_s) + request_s,
        ended_s=np.array(world.ended_s) + request_s,
        load_s=np.array(world.load_s),
        tier=np.array(world.tier, dtype=np.int64),
        replica=np.array(world.replica, dtype=np.int64),
        busy_s=np.array([replica.busy_s for replica in replicas]),
        loading_s=np.array([replica.loading_s for replica in replicas]),
        num_steps=sum(replica.num_steps for replica in replicas),
        num_loads=sum(replica.num_loads for replica in replicas),
        num_evictions=sum(replica.num_evictions for replica in replicas),
        num_reloads=sum(replica.num_reloads for replica in replicas),
        num_events=len(workload) + num_handled,
    )
