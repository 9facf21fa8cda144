"""A plan gives its calls lazily, always the same, and with one thing changed in that thing alone."""

from __future__ import annotations

import itertools
import json
import math
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from loadtest.traffic.changing import override, resolve
from loadtest.traffic.plan import Arrivals, BadPlan, Call, Flow, Lengths, Models, Plan, Requests, Training
from loadtest.traffic.schedule import closed_calls, schedule

IDS = [f"load/bot-{number:05}" for number in range(50)]
REQUESTS = Requests(streaming=0.7, choices={1: 0.8, 4: 0.2}, cancelled=0.1, patience_s=0.5)
PLAN = Plan(
    "two",
    "",
    (
        Flow("many", Arrivals(rate=100), Models(count=50), REQUESTS),
        Flow("bursts", Arrivals("bursts", rate=20), Models(first=10, count=5, popularity="distinct"), begins_s=10),
    ),
    duration_s=30,
)


def calls_of(plan: Plan) -> list[Call]:
    return list(schedule(plan, IDS))


def with_flow(**changes: Any) -> Plan:
    return replace(PLAN, flows=(replace(PLAN.flows[0], **changes), PLAN.flows[1]))


def test_calls_of_all_flows_come_in_order_of_time_and_numbered() -> None:
    calls = calls_of(PLAN)
    assert [call.number for call in calls] == list(range(len(calls)))
    assert all(one.at_s <= other.at_s for one, other in itertools.pairwise(calls))
    assert {call.flow for call in calls} == {"many", "bursts"}
    assert min(call.at_s for call in calls if call.flow == "bursts") >= 10
    assert max(call.at_s for call in calls) < PLAN.ends_s


def test_the_same_plan_gives_the_same_calls_in_another_process() -> None:
    code = (
        "import hashlib\n"
        "from loadtest.traffic.reading import read_plan\n"
        "from loadtest.traffic.schedule import schedule\n"
        "print(hashlib.sha256(repr(list(schedule(read_plan('smoke'), ['m']))).encode()).hexdigest())"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={"PYTHONHASHSEED": seed}
        ).stdout
        for seed in ("1", "2")
    }
    assert len(outputs) == 1


def test_another_seed_gives_other_calls() -> None:
    assert calls_of(PLAN) != calls_of(override(PLAN, seed=2))


@pytest.mark.parametrize(
    ("requests", "alone"),
    [
        (replace(REQUESTS, output_tokens=Lengths(False, 9, 9)), {"num_tokens"}),
        (replace(REQUESTS, prompt_tokens=Lengths(False, 9, 9)), {"prompt"}),
        (replace(REQUESTS, streaming=0.1), {"is_streaming"}),
        (replace(REQUESTS, choices={2: 1}), {"num_choices"}),
        (replace(REQUESTS, cancelled=0.9), {"leaves_after_s"}),
        (replace(REQUESTS, patience_s=0.1), {"leaves_after_s"}),
    ],
)
def test_one_thing_changed_changes_that_alone(requests: Requests, alone: set[str]) -> None:
    changed = calls_of(with_flow(requests=requests))
    differing = {
        name
        for before, after in zip(calls_of(PLAN), changed, strict=True)
        for name in Call.__slots__
        if getattr(before, name) != getattr(after, name)
    }
    assert differing == alone


def test_another_flow_or_another_rate_leaves_a_flow_its_requests() -> None:
    def requests_of(plan: Plan) -> list[Call]:
        return [replace(call, number=0, at_s=0) for call in calls_of(plan) if call.flow == "many"]

    before = requests_of(PLAN)
    assert requests_of(replace(PLAN, flows=PLAN.flows[:1])) == before
    slower = requests_of(override(PLAN, rate_scale=0.5))
    assert slower == before[: len(slower)]


def test_shares_are_as_said() -> None:
    """Each within 5 standard deviations: odds 6e-7 each."""
    calls = calls_of(replace(with_flow(requests=REQUESTS), duration_s=200, flows=with_flow().flows[:1]))
    tests: list[tuple[Callable[[Call], bool], float]] = [
        (lambda call: call.is_streaming, 0.7),
        (lambda call: call.num_choices == 4, 0.2),
        (lambda call: call.leaves_after_s is not None, 0.1),
        (lambda call: call.leaves_after_s is not None and call.leaves_after_s > 0.5, 0.1 / math.e),
    ]
    for is_so, share in tests:
        count, expected = sum(map(is_so, calls)), len(calls) * share
        assert abs(count - expected) < 5 * math.sqrt(expected * (1 - share))


def test_flows_have_models_of_their_own() -> None:
    asked = [call.model for call in calls_of(PLAN) if call.flow == "bursts"]
    assert asked[:7] == [IDS[place] for place in (10, 11, 12, 13, 14, 10, 11)]


def test_fewer_models_than_asked_for_are_refused_at_once_with_how_to_make_more() -> None:
    with pytest.raises(BadPlan, match=r"50 models, and there are 3\. Make more with .*--count 50"):
        schedule(PLAN, IDS[:3])


def test_what_was_not_resolved_is_refused_at_once() -> None:
    with pytest.raises(BadPlan, match="not resolved"):
        schedule(with_flow(arrivals=Arrivals(times_capacity=2)), IDS)


def test_an_hour_of_fifty_thousand_models_is_drawn_as_it_is_taken() -> None:
    plan = Plan("long", "", (Flow("a", Arrivals(rate=1000), Models(count=50_000)),), duration_s=1e9)
    calls = list(itertools.islice(schedule(plan, [str(number) for number in range(50_000)]), 3000))
    assert len({call.model for call in calls}) > 500


def test_a_trace_says_what_it_says_and_the_flow_the_rest(tmp_path: Path) -> None:
    lines = [{"at_s": 1, "model": 3, "output_tokens": 7}, {"at_s": 2, "prompt_tokens": 2}]
    path = tmp_path / "trace.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    flow = Flow("a", Arrivals("trace", trace=path), Models(first=20, count=4, popularity="identical"))
    first, second = schedule(Plan("traced", "", (flow,)), IDS)
    assert (first.at_s, first.model, first.num_tokens) == (1.0, IDS[23], 7)
    assert (second.at_s, second.model, len(second.prompt.split())) == (2.0, IDS[20], 2)
    with pytest.raises(BadPlan, match="models.count = 3: must be at least 4, as the trace asks for so many"):
        schedule(Plan("traced", "", (replace(flow, models=Models(count=3)),)), IDS)


def test_a_closed_loop_has_calls_without_end_and_none_of_them_in_the_schedule() -> None:
    flow = Flow("closed", Arrivals("closed", rate=10), Models(count=50, popularity="churning", favourites=5), REQUESTS)
    plan = Plan("closed", "", (flow,))
    assert list(schedule(plan, IDS)) == []
    calls = list(itertools.islice(closed_calls(plan, flow, IDS), 3000))
    assert [call.number for call in calls] == list(range(3000))
    assert {call.at_s for call in calls} == {0.0}
    assert len({call.model for call in calls}) == 50  # 300 s at its rate: favourites have moved on 30 times


def test_an_open_flow_gives_a_closed_loop_the_same_requests() -> None:
    flow = PLAN.flows[0]
    alone = schedule(replace(PLAN, flows=(flow,)), IDS)
    for opened, closed in itertools.islice(zip(alone, closed_calls(PLAN, flow, IDS), strict=False), 2000):
        assert replace(opened, at_s=0.0) == closed


def test_several_closed_flows_share_their_numbers() -> None:
    numbers = itertools.count(5)
    one, other = (closed_calls(PLAN, flow, IDS, numbers) for flow in PLAN.flows)
    assert [next(one).number, next(other).number, next(one).number] == [5, 6, 7]


def test_options_override_what_a_plan_says_and_nothing_else() -> None:
    plan = replace(PLAN, training=Training(jobs=2))
    changed = override(plan, rate_scale=2, duration_s=50, warmup_s=1, timeout_s=9, seed=8, models=3)
    assert (changed.duration_s, changed.warmup_s, changed.timeout_s, changed.seed) == (50, 1, 9, 8)
    assert [flow.arrivals.rate for flow in changed.flows] == [200, 40]
    assert [(flow.models.first, flow.models.count) for flow in changed.flows] == [(0, 3), (10, 3)]
    assert changed.training == plan.training
    assert override(plan) == plan
    assert override(plan, warmup_s=0).warmup_s == 0


def test_options_that_leave_no_playable_plan_are_refused() -> None:
    with pytest.raises(BadPlan, match=r"plan 'two' with these options: flow 'bursts': begins_s = 10"):
        override(PLAN, duration_s=5)
    with pytest.raises(BadPlan, match="arrivals.rate = 0.0: must be above 0"):
        override(PLAN, rate_scale=0.0)


def test_multiples_become_rates_and_counts() -> None:
    plan = with_flow(arrivals=Arrivals(times_capacity=3), models=Models(times_fit=0.5))
    assert (plan.needs_capacity, plan.needs_fit) == (True, True)
    resolved = resolve(override(plan, rate_scale=2), capacity_rps=40, models_that_fit=25)
    assert resolved.flows[0].arrivals == Arrivals(rate=240, speed=2)
    assert resolved.flows[0].models == Models(count=12)
    assert (resolved.needs_capacity, resolved.needs_fit) == (False, False)
    assert resolve(PLAN, capacity_rps=None, models_that_fit=None) == PLAN


def test_multiples_of_what_is_not_known_are_refused() -> None:
    with pytest.raises(BadPlan, match="that was not measured"):
        resolve(with_flow(arrivals=Arrivals(times_capacity=3)), capacity_rps=None, models_that_fit=1)
    with pytest.raises(BadPlan, match="say how many models with --models"):
        resolve(with_flow(models=Models(times_fit=2)), capacity_rps=1, models_that_fit=None)
