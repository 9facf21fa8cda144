"""Models are asked for as popular as they are said to be. Odds are those of a false alarm at another seed."""

from __future__ import annotations

import numpy as np
import pytest

from loadtest.traffic.plan import Models
from loadtest.traffic.popularity import choose_models
from loadtest.traffic.streams import stream


def chosen(models: Models, times: np.ndarray, seed: int = 1) -> np.ndarray:
    return choose_models(models, stream(seed, "flow", "models"))(times)


def assert_shares(indexes: np.ndarray, shares: np.ndarray) -> None:
    """Each count within 5 standard deviations of its binomial: odds at most 6e-7 each."""
    counts, expected = np.bincount(indexes, minlength=len(shares)), len(indexes) * shares
    assert (np.abs(counts - expected) <= 5 * np.sqrt(expected * (1 - shares))).all()


@pytest.mark.parametrize("exponent", [0.0, 0.7, 1.0, 1.5])
def test_zipf_gives_rank_r_a_weight_of_r_to_the_minus_exponent(exponent: float) -> None:
    """A hundred ranks: odds 6e-5."""
    weights = np.arange(1, 101) ** -exponent
    assert_shares(chosen(Models(count=100, exponent=exponent), np.zeros(100_000)), weights / weights.sum())


def test_uniform_asks_for_all_alike() -> None:
    assert_shares(chosen(Models(count=50, popularity="uniform"), np.zeros(100_000)), np.full(50, 0.02))


def test_identical_is_always_the_first() -> None:
    assert set(chosen(Models(count=9, popularity="identical"), np.zeros(100)).tolist()) == {0}


def test_distinct_comes_again_only_after_all_others_and_goes_on_from_chunk_to_chunk() -> None:
    choose = choose_models(Models(count=7, popularity="distinct"), stream(1, "flow", "models"))
    assert [*choose(np.zeros(5)).tolist(), *choose(np.zeros(6)).tolist()] == [0, 1, 2, 3, 4, 5, 6, 0, 1, 2, 3]


def test_churning_moves_to_the_next_favourites_and_is_zipf_among_them() -> None:
    """Two periods of four favourites: odds 5e-6."""
    models = Models(count=10, popularity="churning", churn_s=10, favourites=4)
    weights = 1 / np.arange(1, 5)
    for period, first in ((0, 0), (1, 4), (2, 8), (3, 2)):
        indexes = chosen(models, np.full(20_000, period * 10 + 5.0), seed=period)
        places = (indexes - first) % 10
        assert places.max() < 4
        assert_shares(places, weights / weights.sum())


def test_more_favourites_than_models_are_all_models() -> None:
    indexes = chosen(Models(count=3, popularity="churning", favourites=8, churn_s=1), np.arange(300.0))
    assert set(indexes.tolist()) == {0, 1, 2}


@pytest.mark.parametrize("popularity", ["identical", "zipf", "uniform", "distinct", "churning"])
def test_the_first_models_are_passed_over_and_none_beyond_the_count_is_asked_for(popularity: str) -> None:
    models = Models(first=100, count=6, popularity=popularity)  # type: ignore[arg-type]
    indexes = chosen(models, np.arange(2000) / 10)
    assert 100 <= indexes.min() <= indexes.max() < 106


def test_the_rarest_of_fifty_thousand_can_be_asked_for() -> None:
    """The upper half holds 6 % of the weight: none among 10,000 draws with odds 1e-277."""
    assert chosen(Models(count=50_000), np.zeros(10_000)).max() >= 25_000
