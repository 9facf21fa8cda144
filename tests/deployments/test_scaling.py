"""How many replicas are wanted: the rules alone, and the loop that they close, through Ray's own delays."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import cloudpickle  # type: ignore[import-untyped]
import pytest
from hypothesis import given
from hypothesis import strategies as st
from ray.serve import autoscaling_policy
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy

from deployments import scaling
from deployments.app import AppArgs, build
from deployments.router import rank
from deployments.scaling import JOBS, GeneratorLoad, Moves, Need, Scaling, every_one, wanted, wanted_generators
from serve.pool.working_set import WorkingSet

GB = 10**9
CALM = GeneratorLoad(texts=0, places=256, asked_bytes=0, budget_bytes=60 * GB, window_s=300)
counts = st.integers(1, 64)
loads = st.builds(
    GeneratorLoad,
    texts=st.floats(0, 5000),
    places=st.just(256),
    asked_bytes=st.floats(0, 500 * GB),
    budget_bytes=st.just(60 * GB),
    window_s=st.just(300.0),
)
fleets = st.lists(loads, min_size=1, max_size=8)


# --- Generators ---------------------------------------------------------------------------------------------------


def test_one_generator_that_has_little_to_do_is_enough() -> None:
    assert wanted_generators(1, [CALM]) == wanted_generators(5, [CALM] * 5) == 1


def test_texts_beyond_what_a_batch_takes_well_want_another_generator() -> None:
    assert wanted_generators(1, [replace(CALM, texts=204)]) == 1
    assert wanted_generators(1, [replace(CALM, texts=206)]) == 2  # of 256 places, four fifths are used well
    assert wanted_generators(1, [replace(CALM, texts=150)], queued=100) == 2
    assert wanted_generators(1, [replace(CALM, texts=2000)]) == 10


def test_models_beyond_what_memory_holds_want_another_generator_though_nobody_waits() -> None:
    assert wanted_generators(1, [replace(CALM, texts=1, asked_bytes=50 * GB)]) == 1
    assert wanted_generators(1, [replace(CALM, texts=1, asked_bytes=55 * GB)]) == 2
    assert wanted_generators(2, [replace(CALM, texts=1, asked_bytes=300 * GB)] * 2) == 12


def test_none_goes_whose_models_the_others_would_at_once_have_to_push_out() -> None:
    at_home = replace(CALM, asked_bytes=36 * GB)  # of 51 that are used well
    assert wanted_generators(2, [at_home] * 2) == 2
    assert wanted_generators(3, [replace(CALM, asked_bytes=20 * GB)] * 3) == 2


def test_models_that_have_moved_are_counted_once() -> None:
    full = [replace(CALM, asked_bytes=55 * GB)] * 3
    assert wanted_generators(3, full) == 4
    assert wanted_generators(3, full, moved_bytes=30 * GB) == 3


def test_a_new_generator_takes_its_share_which_the_others_count_for_a_while() -> None:
    moves = Moves()
    full = replace(CALM, asked_bytes=40 * GB)
    assert moves.update(0, 2, [full] * 2) == 0
    assert moves.update(10, 4, [full] * 2) == 40 * GB  # two of four take half of 80
    assert moves.update(60, 5, [full] * 3) == (40 + 80 / 5) * GB
    assert moves.update(310, 4, [full] * 4) == (40 + 80 / 5) * GB
    assert moves.update(311, 4, [full] * 4) == 80 / 5 * GB
    assert moves.update(361, 4, [full] * 4) == 0


def test_where_nothing_is_known_all_stay() -> None:
    assert wanted_generators(4, []) == 4


@given(fleets, counts, st.integers(0, 7), st.floats(0, 1000), st.floats(0, 100 * GB))
def test_more_demand_never_wants_fewer(
    fleet: list[GeneratorLoad], have: int, which: int, texts: float, more_bytes: float
) -> None:
    one = fleet[which % len(fleet)]
    fuller = [replace(one, texts=one.texts + texts, asked_bytes=one.asked_bytes + more_bytes), *fleet[1:]]
    first = [one, *fleet[1:]]
    assert wanted_generators(have, fuller) >= wanted_generators(have, first)
    assert wanted_generators(have, first, queued=texts) >= wanted_generators(have, first)
    assert wanted_generators(have + 1, first) >= wanted_generators(have, first)


@given(fleets, counts)
def test_what_is_wanted_holds_the_demand_and_is_wanted_still_when_it_is_there(
    fleet: list[GeneratorLoad], have: int
) -> None:
    number = wanted_generators(have, fleet)
    assert number * 60 * GB >= sum(load.asked_bytes for load in fleet)
    assert number * 256 >= sum(load.texts for load in fleet)
    assert wanted_generators(number, fleet) == number
    texts, memory = sum(load.texts for load in fleet) / 256, sum(load.asked_bytes for load in fleet) / (60 * GB)
    assert number <= max(have, math.ceil(texts / 0.8), math.ceil(memory / 0.85), 1)


@given(st.lists(st.builds(Need, st.floats(0, 1e6), st.floats(1, 1e3)), max_size=4), counts)
def test_a_number_that_is_wanted_stays_wanted(needs: list[Need], have: int) -> None:
    number = wanted(have, needs)
    assert number >= 1
    assert wanted(number, needs) == number


# --- What Ray gives, and takes -----------------------------------------------------------------------------------


def point(value: float, timestamp: float = 0.0) -> SimpleNamespace:
    return SimpleNamespace(value=value, timestamp=timestamp)


def context(name: str, target: int = 1, **more: Any) -> SimpleNamespace:
    """What Ray tells of a deployment, as far as it is read."""
    known: dict[str, Any] = {
        "deployment_name": name,
        "target_num_replicas": target,
        "current_num_replicas": target,
        "total_num_requests": 0.0,
        "total_queued_requests": 0.0,
        "raw_metrics": {},
        "policy_state": {},
        "config": AutoscalingConfig(min_replicas=0, max_replicas=8, target_ongoing_requests=128),
    }
    return SimpleNamespace(**(known | more))


def told(loads_by_replica: Mapping[str, Sequence[GeneratorLoad]]) -> dict[str, dict[str, list[Any]]]:
    """A generator's last loads, as its replicas send them."""
    names = CALM.to_stats()
    return {
        name: {one: [point(load.to_stats()[name]) for load in series] for one, series in loads_by_replica.items()}
        for name in names
    }


def decide(*contexts: SimpleNamespace) -> dict[str, float]:
    decided, _ = Scaling()({one.deployment_name: one for one in contexts})
    return decided


def test_there_are_as_many_trainers_as_jobs() -> None:
    gateway = context("gateway", raw_metrics={JOBS: {"a": [point(3, 10.0)]}})
    assert decide(gateway, context("trainer", target=0))["trainer"] == 3


def test_the_gateway_that_counted_last_is_believed() -> None:
    gateway = context("gateway", raw_metrics={JOBS: {"a": [point(9, 1.0), point(5, 7.0)], "b": [point(0, 9.0)]}})
    assert decide(gateway, context("trainer", target=2))["trainer"] == 0


@pytest.mark.parametrize("metrics", [{}, {JOBS: {}}, {JOBS: {"a": []}}])
def test_trainers_stay_while_no_gateway_can_count(metrics: dict[str, Any]) -> None:
    assert "trainer" not in decide(context("gateway", raw_metrics=metrics), context("trainer", target=2))


def test_what_is_not_scaled_is_not_decided() -> None:
    assert decide(context("gateway", target=2)).keys() == {"gateway"}
    assert decide(context("trainer")) == {}


def test_gateways_follow_their_requests() -> None:
    assert decide(context("gateway", total_num_requests=500.0))["gateway"] == 4
    assert decide(context("gateway", target=4, total_num_requests=300.0))["gateway"] == 4
    assert decide(context("gateway", target=4, total_num_requests=30.0))["gateway"] == 1


def test_texts_are_a_mean_and_bytes_are_the_last() -> None:
    series = [replace(CALM, texts=600), replace(CALM, texts=0, asked_bytes=40 * GB)]
    (load,) = scaling.loads_of(context("generator", raw_metrics=told({"a": series})))
    assert (load.texts, load.asked_bytes) == (300, 40 * GB)


def test_a_generator_that_has_not_yet_told_everything_counts_for_nothing() -> None:
    metrics = told({"a": [CALM]})
    metrics["texts"]["b"] = [point(9999)]
    assert decide(context("generator", target=2, raw_metrics=metrics)) == {"generator": 1}


def test_without_a_policy_of_the_application_there_is_every_trainer() -> None:
    assert every_one(SimpleNamespace(capacity_adjusted_max_replicas=4)) == (4, {})


def test_the_policy_can_be_sent_by_value_as_ray_does() -> None:
    policy = AutoscalingPolicy(policy_function="deployments.scaling:Scaling").get_policy()
    assert isinstance(policy, type)
    decided, state = policy()(
        {"t": context("trainer", 0), "g": context("gateway", raw_metrics={JOBS: {"a": [point(2)]}})}
    )
    assert (decided, state) == ({"t": 2, "g": 1}, {})


def test_the_policy_needs_nothing_of_ours_where_it_is_unpickled() -> None:
    cloudpickle.register_pickle_by_value(scaling)
    try:
        assert b"serve." not in cloudpickle.dumps(Scaling) and b"deployments.app" not in cloudpickle.dumps(Scaling)
    finally:
        cloudpickle.unregister_pickle_by_value(scaling)


# --- The closed loop ------------------------------------------------------------------------------------------------


TICK_S = 10  # of the simulated loop; Ray's takes a tenth of a second


@functools.cache
def home_of(model: str, num_seats: int) -> str:
    return rank(model, [f"seat {number}" for number in range(num_seats)], {}, bound=1.5)[0][0]


@dataclass
class Fleet:
    """Generators that take a while to come, models at home by rendezvous, and Ray's own limits and delays."""

    now: list[float]
    start_s: float
    budget_bytes: int = 60 * GB
    target: int = 1
    seats: list[str] = field(default_factory=lambda: ["seat 0"])
    coming: list[float] = field(default_factory=list)
    history: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.asked: dict[str, WorkingSet] = {}
        deployment = build(AppArgs(max_generators=12))._bound_deployment.init_args[1]._bound_deployment
        self.config = deployment._deployment_config.autoscaling_config
        policy = Scaling(clock=lambda: self.now[0])
        self.policy = autoscaling_policy._apply_app_level_autoscaling_config(policy)
        self.state: dict[str, Any] = {}

    def ask(self, model: str, num_bytes: int) -> None:
        home = home_of(model, len(self.seats))
        self.asked.setdefault(home, WorkingSet(300.0, clock=lambda: self.now[0])).note(model, num_bytes)

    def tick(self, texts: float) -> None:
        """Who was asked for comes, who is not wanted goes, and the policy decides."""
        while self.coming and self.coming[0] <= self.now[0]:
            self.coming.pop(0)
            self.seats.append(f"seat {len(self.seats)}")
        each = [
            GeneratorLoad(
                texts=texts / len(self.seats),
                places=256,
                asked_bytes=self.asked[seat].num_bytes if seat in self.asked else 0,
                budget_bytes=self.budget_bytes,
                window_s=300,
            )
            for seat in self.seats
        ]
        metrics = told({seat: [load] for seat, load in zip(self.seats, each, strict=True)})
        given = context(
            "generator", self.target, raw_metrics=metrics, config=self.config, policy_state=self.state.get("g", {})
        )
        given.current_num_replicas = len(self.seats)
        decided, self.state = self.policy({"g": given})
        self.scale(max(1, min(12, decided["g"])))
        self.history.append(self.target)
        self.now[0] += TICK_S

    def scale(self, target: int) -> None:
        self.target = target
        self.coming += [self.now[0] + self.start_s] * (target - len(self.seats) - len(self.coming))
        while len(self.seats) + len(self.coming) > target:
            if self.coming:
                self.coming.pop()
            else:
                self.asked.pop(self.seats.pop(), None)

    @property
    def changes(self) -> list[int]:
        return [b - a for a, b in zip(self.history, self.history[1:], strict=False) if a != b]


@pytest.fixture
def make_fleet(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Fleet]:
    now = [1000.0]
    monkeypatch.setattr(autoscaling_policy, "time", SimpleNamespace(time=lambda: now[0]))
    return lambda start_s: Fleet(now, start_s)


MINUTE = 60


def live(fleet: Fleet, minutes: float, num_models: int, texts: float) -> None:
    """Each of the models is asked for once a minute; of GPT-2 small in bfloat16, with room for its caches."""
    turns = MINUTE // TICK_S
    for turn in range(round(minutes * turns)):
        for number in range(turn % turns, num_models, turns):
            fleet.ask(f"flock/m{number}", GB // 4)
        fleet.tick(texts)


@pytest.mark.parametrize("start_s", [5, 240])
@pytest.mark.parametrize(
    ("num_models", "texts", "number"),
    [(100, 50, 1), (330, 10, 2), (700, 10, 4), (1300, 10, 7), (100, 900, 5)],
)
def test_for_a_demand_that_does_not_change_the_fleet_grows_once_and_stays(
    make_fleet: Callable[..., Fleet], start_s: float, num_models: int, texts: float, number: int
) -> None:
    fleet = make_fleet(start_s)
    live(fleet, 70, num_models, texts)
    assert all(change > 0 for change in fleet.changes)
    assert fleet.target == number
    assert len(set(fleet.history[-40 * MINUTE // TICK_S :])) == 1
    assert fleet.history.index(fleet.target) <= 20 * MINUTE // TICK_S


def test_a_fleet_that_only_loads_again_and_again_grows_within_minutes(make_fleet: Callable[..., Fleet]) -> None:
    fleet = make_fleet(30)
    live(fleet, 4, 480, texts=1)  # 120 GB, asked for in turn; one generator holds 60
    assert fleet.target == 3
    assert 2 in fleet.history[: 90 // TICK_S]  # while the second half of them is yet to be asked for


def test_in_silence_the_fleet_shrinks_to_one_later_than_the_models_are_forgotten(
    make_fleet: Callable[..., Fleet],
) -> None:
    fleet = make_fleet(60)
    live(fleet, 30, 1000, texts=10)
    assert fleet.target >= 5
    live(fleet, 9, 0, texts=0)
    assert fleet.target >= 5
    live(fleet, 11, 0, texts=0)
    assert fleet.target == 1


def test_a_peak_of_ten_seconds_moves_nothing(make_fleet: Callable[..., Fleet]) -> None:
    fleet = make_fleet(60)
    live(fleet, 10 / 60, 10, texts=5000)
    live(fleet, 30, 10, texts=5)
    assert fleet.changes == []


def test_waves_shorter_than_the_delay_do_not_make_the_fleet_swing(make_fleet: Callable[..., Fleet]) -> None:
    fleet = make_fleet(60)
    for _ in range(12):
        live(fleet, 3, 100, texts=800)
        live(fleet, 3, 100, texts=50)
    assert all(change > 0 for change in fleet.changes)
