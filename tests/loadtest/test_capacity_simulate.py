"""The simulator where the answer is known, and the laws that hold whatever comes."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loadtest.capacity.costs import PRESETS, Costs, LoadCosts, StepCosts
from loadtest.capacity.figures import figures, records
from loadtest.capacity.simulate import REFUSED, Cluster, Outcome, simulate
from loadtest.capacity.workload import Traffic, Workload, draw, of_calls, of_records
from loadtest.traffic.plan import Call

LOADS = LoadCosts(host_s=0.02, disk_s=0.1, hub_s=1.0)


def costs(step: StepCosts, *, slots: int = 8, max_sequences: int = 64, host_models: int = 1000) -> Costs:
    return Costs("test", "made up", step, LOADS, slots=slots, max_sequences=max_sequences, host_models=host_models)


def work(at_s: list[float], models: list[int] | None = None, tokens: int | list[int] = 10, prompt: int = 1) -> Workload:
    num = len(at_s)
    models = models or [0] * num
    return Workload(
        at_s=np.array(at_s, dtype=np.float64),
        model=np.array(models, dtype=np.int64),
        prompt_tokens=np.full(num, prompt, dtype=np.int64),
        output_tokens=np.array([tokens] * num if isinstance(tokens, int) else tokens, dtype=np.int64),
        num_choices=np.ones(num, dtype=np.int64),
        names=tuple(f"m{number}" for number in range(max(models, default=0) + 1)),
    )


def run(workload: Workload, cost: Costs, replicas: int = 1, *, warm: bool = True) -> Outcome:
    return simulate(workload, Cluster(cost, replicas, is_warm=warm, max_ongoing=10**6, max_queued=10**6))


# --- Known answers --------------------------------------------------------------------------------------------


def test_one_text_takes_its_load_its_prompt_and_its_steps() -> None:
    step = StepCosts(base_s=0.001, per_model_s=0.002, per_row_s=0.003, per_prompt_token_s=0.0005)
    outcome = run(work([1.0], tokens=10, prompt=5), replace(costs(step), request_s=0.01), warm=False)
    assert outcome.first_s[0] == pytest.approx(1 + 0.1 + 4 * 0.0005 + 0.006 + 0.01)  # 0.1: from disk, the first time
    assert outcome.ended_s[0] == pytest.approx(1 + 0.1 + 4 * 0.0005 + 10 * 0.006 + 0.01)
    assert outcome.load_s[0] == pytest.approx(0.1)


def test_who_comes_amid_a_step_joins_at_its_end() -> None:
    step = StepCosts(base_s=0.0, per_model_s=0.010, per_row_s=0.0)
    outcome = run(work([0.0, 0.013], tokens=[4, 1]), costs(step))
    assert outcome.first_s[1] == pytest.approx(0.030)  # waits for 0.020, then one step
    assert outcome.ended_s.tolist() == pytest.approx([0.040, 0.030])


def test_texts_of_other_models_make_every_step_longer() -> None:
    step = StepCosts(base_s=0.0, per_model_s=0.010, per_row_s=0.001)
    outcome = run(work([0.0, 0.0], models=[0, 1], tokens=[2, 2]), costs(step))
    # The first steps alone for 11 ms, then both for 22 ms, then the second alone.
    assert outcome.ended_s.tolist() == pytest.approx([0.033, 0.044])


def test_a_row_at_a_time_is_a_queue_as_pollaczek_and_khinchine_have_it() -> None:
    """M/D/1: one row, all texts of one length, so a mean wait of rho * s / (2 * (1 - rho)); seed 3, within 5 %."""
    step, tokens, rho = StepCosts(base_s=0.01, per_model_s=0.0, per_row_s=0.0), 10, 0.7
    service_s = 0.01 * tokens
    workload = draw(Traffic(rho / service_s, 1, tokens=tokens, prompt_tokens=1, spread=0.0), duration_s=9_000, seed=3)
    outcome = run(workload, costs(step, max_sequences=1))
    waits_s = outcome.ended_s - workload.at_s - service_s
    assert waits_s.mean() == pytest.approx(rho * service_s / (2 * (1 - rho)), rel=0.05)


def test_costs_by_row_alone_are_processor_sharing() -> None:
    """M/G/1-PS: a mean sojourn of s / (1 - rho) whatever the lengths' distribution; seed 5, within 5 %.

    Steps are short beside a text, or waiting for their ends would show.
    """
    tokens, rho, row_s = 400, 0.6, 0.0005
    step = StepCosts(base_s=0.0, per_model_s=0.0, per_row_s=row_s)
    service_s = tokens * row_s
    traffic = Traffic(rho / service_s, 1, tokens=tokens, prompt_tokens=1, spread=1.0)
    workload = draw(traffic, duration_s=8_000, seed=5)
    outcome = run(workload, costs(step, max_sequences=10_000))
    assert (outcome.ended_s - workload.at_s).mean() == pytest.approx(service_s / (1 - rho), rel=0.05)


def test_weights_that_are_read_once_for_all_rows_never_queue() -> None:
    step = StepCosts(base_s=0.0, per_model_s=0.001, per_row_s=0.0)
    workload = draw(Traffic(500.0, 1, tokens=30, prompt_tokens=1, spread=0.0), duration_s=10, seed=1)
    outcome = run(workload, costs(step, max_sequences=1_000))
    assert (outcome.ended_s - workload.at_s).max() <= 0.031 + 1e-9


def test_a_neighbour_at_work_slows_a_step_as_the_costs_say() -> None:
    step = StepCosts(base_s=0.01, per_model_s=0.0, per_row_s=0.0, while_neighbour=0.5)
    both = replace(costs(step), replicas_per_host=2)
    homes = {seat: next(m for m in range(20) if _home(m) == seat) for seat in (0, 1)}
    workload = work([0.0, 0.0], models=[homes[0], homes[1]], tokens=[10, 20])
    outcome = run(workload, both, 2)
    # Both step at two thirds of their pace until the first ends at 0.15 s; then ten steps remain to the other.
    assert outcome.ended_s.tolist() == pytest.approx([0.15, 0.25])


def test_reading_and_all_else_are_slowed_by_a_neighbour_each_in_its_own_way() -> None:
    step = StepCosts(0.01, 0.02, 0.0, while_neighbour=0.5, reading_while_neighbour=1.0)
    assert step.slowed_s(2, 1, 1.0) == pytest.approx(0.015 + 0.08)
    assert step.slowed_s(2, 1, 0.0) == step.step_s(2, 1) == pytest.approx(0.05)


def test_a_load_takes_longer_beside_replicas_that_step() -> None:
    loads = LoadCosts(host_s=0.1, disk_s=0.1, hub_s=0.1, while_busy=0.5)
    busy = replace(costs(StepCosts(0.01, 0.0, 0.0)), load=loads)
    outcome = run(work([0.0, 0.15], models=[0, 1], tokens=[100, 1]), busy, warm=False)
    assert outcome.load_s.tolist() == pytest.approx([0.1, 0.15])


def _home(model: int) -> int:
    from loadtest.capacity.routing import order

    return order(f"m{model}", 2)[0]


# --- Laws -----------------------------------------------------------------------------------------------------

TINY = costs(StepCosts(0.001, 0.002, 0.001, per_prompt_token_s=0.0001, while_loading=0.3), slots=3, host_models=4)


@settings(max_examples=60)
@given(st.integers(0, 10_000), st.integers(1, 4), st.floats(1, 400), st.integers(1, 12), st.integers(1, 40))
def test_every_request_ends_once_or_is_refused(
    seed: int, replicas: int, rate: float, num_models: int, max_ongoing: int
) -> None:
    workload = draw(Traffic(rate, num_models, tokens=8), duration_s=1.0, seed=seed)
    outcome = simulate(workload, Cluster(TINY, replicas, max_ongoing=max_ongoing, max_queued=5))
    refused = outcome.tier == REFUSED
    assert (np.isnan(outcome.ended_s) == refused).all() and (np.isnan(outcome.first_s) == refused).all()
    answered = ~refused
    assert (outcome.first_s[answered] > workload.at_s[answered]).all()
    assert (outcome.ended_s[answered] >= outcome.first_s[answered] - 1e-9).all()
    assert Counter(record.number for record in records(outcome)) == Counter(range(len(workload)))


@given(st.lists(st.integers(0, 6), min_size=1, max_size=60), st.integers(1, 5))
def test_one_after_another_hits_are_those_of_an_lru(models: list[int], slots: int) -> None:
    step = StepCosts(base_s=0.0001, per_model_s=0.0, per_row_s=0.0)
    outcome = run(work([float(n) for n in range(len(models))], models, tokens=1), costs(step, slots=slots), warm=False)
    kept: list[int] = []
    for number, model in enumerate(models):
        assert (outcome.tier[number] == 0) == (model in kept)
        kept = [model, *(other for other in kept if other != model)][:slots]


def test_a_model_that_many_wait_for_is_loaded_once() -> None:
    outcome = run(work([0.0] * 20), costs(StepCosts(0.001, 0.0, 0.0)), warm=False)
    assert outcome.num_loads == 1


def test_no_more_models_load_at_once_than_there_are_turns() -> None:
    outcome = run(work([0.0] * 4, [0, 1, 2, 3], tokens=1), costs(StepCosts(0.001, 0.0, 0.0)), warm=False)
    assert outcome.load_s.tolist() == pytest.approx([0.1, 0.1, 0.2, 0.2])


def test_a_model_that_is_always_in_use_goes_once_patience_is_over() -> None:
    step = StepCosts(base_s=0.01, per_model_s=0.0, per_row_s=0.0)
    popular = [n * 0.05 for n in range(200)]  # texts of 0.1 s without a gap
    workload = work(
        sorted([*popular, 1.0]), [int(at == 1.0 and n == 21) for n, at in enumerate(sorted([*popular, 1.0]))]
    )
    assert workload.model.sum() == 1
    outcome = run(workload, costs(step, slots=1))
    waited_s = outcome.load_s[workload.model == 1][0]
    assert 2.0 < waited_s < 2.5


def test_the_same_arguments_give_the_same_outcome() -> None:
    workload = draw(Traffic(100, 20, tokens=10), duration_s=5, seed=2)
    first, second = (simulate(workload, Cluster(TINY, 2)) for _ in range(2))
    assert (first.ended_s == second.ended_s).all() and first.num_events == second.num_events


def test_more_replicas_are_never_worse_beyond_noise() -> None:
    workload = draw(Traffic(300, 50, tokens=20), duration_s=10, seed=4)
    found = [figures(simulate(workload, Cluster(TINY, n, is_warm=True))) for n in (1, 2, 4, 8)]
    p99 = [figure.p99_ms or 0.0 for figure in found]
    refused = [figure.refused for figure in found]
    assert all(after <= before * 1.05 for before, after in zip(p99[1:], p99[2:], strict=False))
    assert refused == sorted(refused, reverse=True) and refused[0] > refused[-1] == 0


def test_figures_and_records_tell_the_same() -> None:
    workload = draw(Traffic(60, 12, tokens=12), duration_s=10, seed=6)
    outcome = simulate(workload, Cluster(TINY, 2))
    fast, slow = figures(outcome), list(records(outcome))
    assert fast.requests == len(slow)
    assert fast.hit_rate == pytest.approx(sum(record.tier == "device" for record in slow) / len(slow))
    assert fast.p50_ttft_ms == pytest.approx(float(np.median([record.ttft_s or 0 for record in slow])) * 1e3)
    again = of_records(slow)
    assert (again.at_s == workload.at_s).all() and (again.output_tokens == workload.output_tokens).all()


def test_no_traffic_has_figures_too() -> None:
    assert figures(run(work([]), TINY)).requests == 0


def test_the_calls_of_a_plan_become_a_workload_in_order_of_time() -> None:
    calls = [Call(0, "f", 2.0, "b", "hello there", 5), Call(1, "f", 1.0, "a", "", 0, num_choices=3)]
    workload = of_calls(calls)
    assert workload.at_s.tolist() == [1.0, 2.0] and workload.names == ("a", "b")
    assert workload.num_tokens == 3 * 1 + 5


def test_presets_are_sane() -> None:
    for preset in PRESETS.values():
        assert preset.step.step_s(1, 1) > 0 and preset.load.host_s < preset.load.disk_s < preset.load.hub_s
