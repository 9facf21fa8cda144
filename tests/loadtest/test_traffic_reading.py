"""Plans are read from TOML as they are spelled, and refused with the place, the value and what is allowed."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loadtest.traffic.changing import resolve
from loadtest.traffic.limits import RANGES, Range
from loadtest.traffic.plan import Arrivals, BadPlan, Flow, Lengths, Models, Plan, Requests, Training
from loadtest.traffic.reading import PLANS, as_mapping, plan_names, plan_of, read_plan
from loadtest.traffic.schedule import schedule

COMMON = """
about = "two flows"
seed = 7
duration_s = 20
[arrivals]
rate = 5
[models]
count = 3
popularity = "uniform"
[requests]
choices = { 1 = 0.9, 4 = 0.1 }
output_tokens = [8, 40]
[[flow]]
name = "first"
[[flow]]
name = "second"
begins_s = 10
[flow.arrivals]
process = "bursts"
burst_s = 2
[flow.models]
count = 9
[flow.requests]
prompt_tokens = 4
"""


def written(folder: Path, text: str) -> str:
    path = folder / "mine.toml"
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_flows_take_what_is_common_and_override_it_key_by_key(tmp_path: Path) -> None:
    plan = read_plan(written(tmp_path, COMMON))
    first, second = plan.flows
    assert (plan.name, plan.seed, plan.duration_s) == ("mine", 7, 20.0)
    assert first.arrivals == Arrivals(rate=5)
    assert second.arrivals == Arrivals("bursts", rate=5, burst_s=2)
    assert second.models == Models(count=9, popularity="uniform")
    assert second.requests.output_tokens == first.requests.output_tokens == Lengths(False, 8, 40)
    assert second.requests.prompt_tokens == Lengths(False, 4, 4)
    assert first.requests.choices == {1: 0.9, 4: 0.1}


def test_a_file_without_flows_has_one_of_its_own_name(tmp_path: Path) -> None:
    assert read_plan(written(tmp_path, "[arrivals]\nrate = 2")).flows == (Flow("mine", Arrivals(rate=2)),)


def test_a_rate_of_a_flow_replaces_the_multiple_that_is_common() -> None:
    flows = [{"name": "a", "arrivals": {"rate": 3}, "models": {"count": 2}}, {"name": "b"}]
    plan = plan_of({"arrivals": {"times_capacity": 2}, "models": {"times_fit": 2}, "flow": flows}, source="x")
    assert plan.flows[0].arrivals == Arrivals(rate=3)
    assert plan.flows[0].models == Models(count=2)
    assert plan.flows[1].arrivals.times_capacity == 2
    assert plan.needs_capacity and plan.needs_fit


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("rate = 5", "rate is not known: it takes name, about, seed"),
        ("[arrivals]\nrat = 5", "flow 'mine': arrivals.rat is not known: it takes process, rate"),
        ("[arrivals]\nrate = 0", "flow 'mine': arrivals.rate = 0.0: must be above 0"),
        ("[arrivals]\nrate = inf", "arrivals.rate = inf: must be above 0"),
        ("[arrivals]\nrate = nan", "arrivals.rate = nan: must be above 0"),
        ('[arrivals]\nrate = "5"', "arrivals.rate = '5': must be a number"),
        ("[arrivals]\nrate = true", "arrivals.rate = True: must be a number"),
        ('[arrivals]\nprocess = "fast"', 'must be one of "poisson", "constant", "bursts", "diurnal"'),
        ('[arrivals]\nprocess = "trace"', "arrivals.trace = '': must be the name of a file"),
        ('[arrivals]\nprocess = "trace"\ntrace = "none.jsonl"', "must be a file that is there"),
        ('[arrivals]\nprocess = "bursts"\nburst_s = 10', "must be below burst_every_s, which is 10"),
        ('[arrivals]\nprocess = "closed"\ntimes_capacity = 1', "absent where process is 'closed'"),
        ("[requests]\nstreaming = 1.1", "requests.streaming = 1.1: must be at least 0 and at most 1"),
        ("[requests]\nstreaming = true", "requests.streaming = True: must be a number"),
        ("[requests]\nends_freely = 1", "requests.ends_freely = 1: must be true or false"),
        ("[requests]\nchoices = { one = 1 }", "must be a table from numbers of texts to their weights"),
        ("[requests]\nchoices = { 0 = 1 }", "must be a table whose keys are between 1 and 128"),
        ("[requests]\nchoices = { 1 = 0 }", "must be a table of weights"),
        ("[requests]\nchoices = { 1 = -1, 2 = 5 }", "must be a table of weights"),
        ("[requests]\nchoices = 4", "must be a table from numbers of texts"),
        ("[requests]\noutput_tokens = [9, 8]", "requests.output_tokens = [9, 8]: must be two bounds in order"),
        ("[requests]\noutput_tokens = 0", "must be two bounds in order, between 1 and"),
        ("[requests]\noutput_tokens = [1, 2, 3]", 'must be "tweets", a number of tokens, or two'),
        ('[requests]\nprompt_tokens = "posts"', 'must be "tweets", a number of tokens, or two'),
        ("[models]\ncount = 0", "models.count = 0: must be at least 1"),
        ("[models]\ncount = 1.5", "models.count = 1.5: must be a whole number"),
        ("[training]\nposts = 0", "training.posts = 0: must be at least 1"),
        ("duration_s = -1", "duration_s = -1.0: must be above 0"),
        ("seed = -1", "seed = -1: must be at least 0"),
        ("flow = 5", "flow = 5: must be a list of tables"),
        ("flow = []", "names of flows = []: must be one or more"),
        ("arrivals = 5", "arrivals = 5: must be a table, written [arrivals]"),
        ("[[flow]]", "a [[flow]] has no name"),
        (
            '[[flow]]\nname = "a"\n[[flow]]\nname = "a"',
            "names of flows = ['a', 'a']: must be one or more, each its own",
        ),
        ('[[flow]]\nname = "a"\nbegins_s = 32', "flow 'a': begins_s = 32.0: must be below the plan's end at 32 s"),
        ('[[flow]]\nname = "a"\nbegins_s = 5\nends_s = 5', "must be above begins_s, which is 5"),
        ("a = b", "not TOML"),
    ],
)
def test_what_is_wrong_is_named_with_its_place_its_value_and_what_is_allowed(
    tmp_path: Path, text: str, said: str
) -> None:
    with pytest.raises(BadPlan) as caught:
        read_plan(written(tmp_path, text))
    assert said in str(caught.value)
    assert str(caught.value).startswith(str(tmp_path / "mine.toml") + ": ")


def test_a_plan_that_is_not_there_is_answered_with_those_that_are() -> None:
    with pytest.raises(BadPlan, match=r"no plan 'smook': name one of .*smoke.*, or a TOML file"):
        read_plan("smook")


def test_a_folder_or_bytes_are_no_plan(tmp_path: Path) -> None:
    with pytest.raises(BadPlan, match="cannot be read"):
        read_plan(str(tmp_path))
    (tmp_path / "bytes.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(BadPlan, match="not TOML"):
        read_plan(str(tmp_path / "bytes.toml"))


def within(allowed: Range) -> st.SearchStrategy[float]:
    most = min(allowed.most, 1e6)
    return st.floats(allowed.least, most, exclude_min=allowed.is_open, allow_subnormal=False)


def part_of(part: type, **others: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    whole = {"clients", "first", "count", "favourites", "jobs", "epochs", "posts", "seed"}
    of_field = {
        name: st.integers(int(allowed.least), int(min(allowed.most, 2**40))) if name in whole else within(allowed)
        for name, allowed in RANGES[part].items()
        if name not in others
    }
    return st.builds(part, **of_field, **others)


LENGTHS = st.one_of(
    st.just(Lengths()),
    st.tuples(st.integers(1, 99_999), st.integers(0, 1)).map(lambda pair: Lengths(False, pair[0], sum(pair))),
)
FLOWS = st.builds(
    Flow,
    name=st.text(min_size=1, max_size=8),
    arrivals=part_of(
        Arrivals,
        process=st.sampled_from(["poisson", "constant", "diurnal"]),
        times_capacity=st.none() | st.floats(0.1, 9),
    ),
    models=part_of(
        Models,
        popularity=st.sampled_from(["identical", "zipf", "uniform", "distinct", "churning"]),
        times_fit=st.none() | st.floats(0.1, 9),
    ),
    requests=part_of(
        Requests,
        api=st.sampled_from(["openai", "chat", "tgi"]),
        choices=st.dictionaries(st.integers(1, 128), st.floats(0.1, 5), min_size=1, max_size=3),
        prompt_tokens=LENGTHS,
        output_tokens=LENGTHS,
        ends_freely=st.booleans(),
    ),
)
ANY_PLANS = part_of(
    Plan,
    name=st.text(max_size=8),
    about=st.text(max_size=8),
    flows=st.lists(FLOWS, min_size=1, max_size=3, unique_by=lambda flow: flow.name).map(tuple),
    training=part_of(Training),
)


@settings(max_examples=30)
@given(ANY_PLANS)
def test_a_plan_written_down_as_json_is_read_as_the_same_plan(plan: Plan) -> None:
    assert plan_of(json.loads(json.dumps(as_mapping(plan))), source="a header") == plan


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=5,
)
KEYS = {
    "": ["name", "about", "seed", "duration_s", "warmup_s", "timeout_s", "arrivals", "models", "requests", "flow"],
    "arrivals": ["process", "rate", "burst_s", "trough", "clients", "trace"],
    "models": ["count", "popularity", "exponent"],
    "requests": ["choices", "prompt_tokens", "streaming", "ends_freely", "api"],
    "training": ["jobs", "every_s"],
}


@settings(max_examples=60)
@given(st.data())
def test_whatever_the_values_a_plan_is_either_read_or_refused_as_bad(data: st.DataObject) -> None:
    table = data.draw(st.dictionaries(st.sampled_from(KEYS[""]), JSON, max_size=3))
    part = data.draw(st.sampled_from(["arrivals", "models", "requests", "training"]))
    table[part] = data.draw(st.dictionaries(st.sampled_from(KEYS[part]), JSON, max_size=3))
    try:
        plan = plan_of(table, source="x")
    except BadPlan as exc:
        assert str(exc).startswith("x: ")
    else:
        assert plan_of(as_mapping(plan), source="x") == plan


def test_api_keys_are_not_written_down() -> None:
    plan = Plan("x", "", (Flow("a", key="secret"),))
    assert "secret" not in json.dumps(as_mapping(plan))


@pytest.mark.parametrize("name", plan_names())
def test_plans_that_come_with_the_package_say_what_they_ask_and_can_be_played(name: str) -> None:
    plan = read_plan(name)
    assert "A good answer" in plan.about
    assert "?" in plan.about
    playable = resolve(plan, capacity_rps=30, models_that_fit=8)
    calls = list(schedule(playable, [str(number) for number in range(playable.num_models)]))
    assert {call.flow for call in calls} == {flow.name for flow in plan.flows}


def test_the_page_of_plans_names_every_key_and_its_example_can_be_read(tmp_path: Path) -> None:
    page = (PLANS / "README.md").read_text(encoding="utf-8")
    example = page.partition("```toml\n")[2].partition("```")[0]
    assert [flow.name for flow in read_plan(written(tmp_path, example)).flows] == ["readers", "a storm"]
    for part in (Arrivals, Models, Requests, Training):
        assert {field.name for field in fields(part) if f"`{field.name}`" not in page} == set()


def test_all_plans_are_there() -> None:
    assert plan_names() == [
        "cold-storm",
        "generate-while-training",
        "noisy-neighbour",
        "outside",
        "overload-3x",
        "smoke",
        "soak",
        "steady",
        "zipf-more-models-than-memory",
    ]


def test_smoke_streams_asks_for_several_texts_and_hangs_up_with_one_model_and_whatever_the_seed() -> None:
    plan = read_plan("smoke")
    assert plan.ends_s == 15
    assert not plan.needs_capacity and not plan.needs_fit
    calls = list(schedule(plan, ["fledgling"]))
    assert len(calls) < 120
    assert {call.is_streaming for call in calls} == {True, False}
    assert {call.num_choices for call in calls} == {1, 3}
    leaving = [call for call in calls if call.leaves_after_s is not None]
    assert len(leaving) == 8  # evenly: a property of the plan
    assert sum(call.at_s >= plan.warmup_s for call in leaving) == 7
