"""The simulator's router against the service's own."""

from __future__ import annotations

import warnings

from hypothesis import given
from hypothesis import strategies as st

from loadtest.capacity import routing
from loadtest.capacity.routing import Router, order

with warnings.catch_warnings():  # of pydantic's, about Ray's own models
    warnings.simplefilter("ignore")
    from deployments.router import BOUND, SPARE_LOAD, rank

MODELS = [f"huggingtweets/user{number}" for number in range(200)]


def test_the_constants_are_the_services() -> None:
    assert (routing.BOUND, routing.SPARE_LOAD) == (BOUND, SPARE_LOAD)


@given(st.sampled_from(MODELS), st.lists(st.integers(0, 60), min_size=1, max_size=12), st.sampled_from([1.0, 1.5, 3.0]))
def test_it_chooses_whom_the_service_ranks_first(model: str, loads: list[int], bound: float) -> None:
    router = Router([model], len(loads), bound=bound)
    router.load, router.total = list(loads), sum(loads)
    names = [f"seat {seat}" for seat in range(len(loads))]
    ranks = rank(model, names, dict(zip(names, loads, strict=True)), bound=bound)
    assert f"seat {router.choose(0)}" == ranks[0][0]


def test_case_does_not_decide_where_a_model_lives() -> None:
    assert order("Bots/Ada", 8) == order("bots/ada", 8)


def test_many_replicas_get_alike_many_models() -> None:
    router = Router([f"m{number}" for number in range(20_000)], 100)
    homes = [0] * 100
    for model in range(20_000):
        homes[router.preferred(model)[0]] += 1
    # Poisson of mean 200: five standard deviations either way. The hash is fixed, so this cannot fail by chance.
    assert min(homes) > 130 and max(homes) < 270


def test_one_replica_more_takes_only_its_own_share_of_models_from_the_others() -> None:
    before, after = Router([""] * 5_000, 100), Router([""] * 5_000, 101)
    moved = [(before.preferred(m)[0], after.preferred(m)[0]) for m in range(5_000)]
    assert all(new in (old, 100) for old, new in moved)


def test_where_a_model_finds_all_its_favourites_crowded_another_replica_takes_it() -> None:
    router = Router(["m"], 100)
    for seat in router.preferred(0):
        router.load[seat] = 1_000
    router.total = sum(router.load)
    chosen = router.choose(0)
    assert chosen not in router.preferred(0) and router.load[chosen] == 0


def test_a_hot_model_spills_in_its_own_order_whether_that_is_kept_or_made_anew() -> None:
    router, other = Router(["m"], 100), Router(["m"], 100)
    chosen = []
    for _ in range(40):
        seat = router.choose(0)
        chosen.append(seat)
        router.load[seat], router.total = 1_000, router.total + 1_000
    assert len(set(chosen)) == 40 and chosen[:8] == other.preferred(0)


def test_full_replicas_are_passed_over_and_nobody_is_chosen_when_all_are() -> None:
    router = Router(["m"], 3)
    first, second, _ = router.preferred(0)
    assert router.choose(0, [seat == first for seat in range(3)]) == second
    assert router.choose(0, [True] * 3) == -1
