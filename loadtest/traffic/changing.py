"""A plan made another: what the command line overrides, and what is only known once the server was looked at."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from loadtest.traffic.limits import check
from loadtest.traffic.plan import Arrivals, BadPlan, Models, Plan


def override(
    plan: Plan,
    *,
    rate_scale: float = 1.0,
    duration_s: float | None = None,
    warmup_s: float | None = None,
    timeout_s: float | None = None,
    seed: int | None = None,
    models: int | None = None,
) -> Plan:
    """The plan with other values; None leaves what it says. `models`: so many for each flow.

    Raises: BadPlan
    """
    given = {"duration_s": duration_s, "warmup_s": warmup_s, "timeout_s": timeout_s, "seed": seed}
    changed = replace(plan, **{name: value for name, value in given.items() if value is not None})  # type: ignore[arg-type]
    changed = _with_arrivals(changed, lambda arrivals: _scaled(arrivals, rate_scale))
    if models is not None:
        changed = _with_models(changed, lambda each: replace(each, count=models, times_fit=None))
    return check(changed, f"plan {plan.name!r} with these options")


def resolve(plan: Plan, *, capacity_rps: float | None, models_that_fit: int | None) -> Plan:
    """The plan with `times_capacity` and `times_fit` as rates and counts; see `Plan.needs_capacity`, `Plan.needs_fit`.

    Raises: BadPlan where what it needs is not given.
    """
    changed = _with_arrivals(plan, lambda arrivals: _with_rate(arrivals, capacity_rps, plan.name))
    changed = _with_models(changed, lambda models: _with_count(models, models_that_fit, plan.name))
    return check(changed, f"plan {plan.name!r} for this server")


def _with_arrivals(plan: Plan, change: Callable[[Arrivals], Arrivals]) -> Plan:
    return replace(plan, flows=tuple(replace(flow, arrivals=change(flow.arrivals)) for flow in plan.flows))


def _with_models(plan: Plan, change: Callable[[Models], Models]) -> Plan:
    return replace(plan, flows=tuple(replace(flow, models=change(flow.models)) for flow in plan.flows))


def _scaled(arrivals: Arrivals, scale: float) -> Arrivals:
    times = arrivals.times_capacity
    return replace(
        arrivals,
        rate=arrivals.rate * scale,
        speed=arrivals.speed * scale,
        times_capacity=None if times is None else times * scale,
    )


def _with_rate(arrivals: Arrivals, capacity_rps: float | None, name: str) -> Arrivals:
    if arrivals.times_capacity is None:
        return arrivals
    if capacity_rps is None:
        raise BadPlan(f"plan {name!r} offers a multiple of what the server can do, and that was not measured")
    return replace(arrivals, rate=arrivals.times_capacity * capacity_rps, times_capacity=None)


def _with_count(models: Models, models_that_fit: int | None, name: str) -> Models:
    if models.times_fit is None:
        return models
    if models_that_fit is None:
        raise BadPlan(
            f"plan {name!r} asks for a multiple of the models that fit in memory, and the server does not say "
            "how many do: say how many models with --models"
        )
    return replace(models, count=max(round(models.times_fit * models_that_fit), 1), times_fit=None)
