"""A plan made ready for one server: how many models there are and fit, and what rates its multiples of capacity are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from loadtest.client.capacity import measure_capacity
from loadtest.client.facts import Server
from loadtest.client.target import Target
from loadtest.traffic.changing import override, resolve
from loadtest.traffic.plan import BadPlan, Flow, Plan

_ANY_RPS = 100.0  # before the capacity is known: only the order of calls is used then


@dataclass(frozen=True, slots=True)
class Settled:
    """A plan that can be played, what was measured for it, and what whoever reads the result has to know."""

    plan: Plan
    facts: Mapping[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


async def settle(
    plan: Plan,
    target: Target,
    server: Server,
    *,
    are_models_named: bool = False,
    warmup_s: float = 2.0,
    probe_s: float = 5.0,
) -> Settled:
    """Looks at the server's capacity, if the plan speaks of it: closed loops of `warmup_s` + `probe_s`.

    A plan about a number of models is played with those that there are, and a note; one about more or fewer models
    than fit in memory only where somebody has named the models.

    Raises: BadPlan
    """
    may_be_fewer = are_models_named or not plan.needs_fit
    if may_be_fewer and plan.needs_fit and server.models_that_fit is None:
        plan = override(plan, models=len(server.models))

    def resolved(capacity_rps: float) -> Settled:
        wanted = resolve(plan, capacity_rps=capacity_rps, models_that_fit=server.models_that_fit)
        if not may_be_fewer or wanted.num_models <= len(server.models):
            return Settled(wanted)
        note = f"The plan asks for {wanted.num_models:,} models, and there are {len(server.models):,}: it was easier."
        return Settled(_within(wanted, len(server.models)), notes=(note,))

    settled = resolved(_ANY_RPS)
    if not plan.needs_capacity:
        return settled
    capacity = await measure_capacity(settled.plan, target, models=server.models, warmup_s=warmup_s, probe_s=probe_s)
    if not capacity.rps:
        raise BadPlan(f"plan {plan.name!r} offers a multiple of what the server can do, and it answers nothing")
    facts = {"capacity_rps": round(capacity.rps, 3), "capacity_clients": capacity.clients}
    return replace(resolved(capacity.rps), facts=facts)


def _within(plan: Plan, num_models: int) -> Plan:
    """With no more models than there are; a flow keeps models of its own as long as there are enough."""

    def fewer(flow: Flow) -> Flow:
        count = min(flow.models.count, num_models)
        return replace(flow, models=replace(flow.models, count=count, first=min(flow.models.first, num_models - count)))

    return replace(plan, flows=tuple(map(fewer, plan.flows)))


def total_rate(plan: Plan) -> float:
    """Requests a second, on average while all flows are there.

    Raises: BadPlan where a flow has none.
    """
    for flow in plan.flows:
        process = flow.arrivals.process
        if process in ("trace", "closed"):
            raise BadPlan(f"plan {plan.name!r} has no rate: the arrivals of flow {flow.name!r} are {process!r}")
    return sum(flow.arrivals.rate for flow in plan.flows)
