"""Requests arrive as often as is said, and as each process has it. Odds are those of a false alarm at another seed."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest

from loadtest.traffic.arrivals import CHUNK, _when, arrival_times
from loadtest.traffic.plan import Arrivals, BadPlan
from loadtest.traffic.streams import stream

PERIODIC = [
    Arrivals("bursts", rate=50, burst_every_s=10, burst_s=1, burst_factor=5),
    Arrivals("diurnal", rate=50, period_s=20, trough=0.2),
]


def times_of(arrivals: Arrivals, begins_s: float = 0.0, ends_s: float = 400.0, seed: int = 1) -> np.ndarray:
    return np.array(list(arrival_times(arrivals, begins_s, ends_s, stream(seed, "flow", "arrivals"))))


@pytest.mark.parametrize("arrivals", [Arrivals(rate=50), *PERIODIC], ids=lambda arrivals: str(arrivals.process))
def test_the_mean_rate_is_as_said(arrivals: Arrivals) -> None:
    """Of a Poisson process, 20,000 ± 5 standard deviations: odds 6e-7."""
    assert abs(len(times_of(arrivals)) - 20_000) < 5 * math.sqrt(20_000)


@pytest.mark.parametrize("arrivals", [Arrivals(rate=50), *PERIODIC], ids=lambda arrivals: str(arrivals.process))
def test_times_are_in_order_and_within_the_flow(arrivals: Arrivals) -> None:
    times = times_of(arrivals, 3.0, 47.0)
    assert (np.diff(times) >= 0).all()
    assert times[0] >= 3.0
    assert times[-1] < 47.0


def test_gaps_of_poisson_are_exponential() -> None:
    """Kolmogorov-Smirnov: above 2.72 / sqrt(n) with odds 2 * exp(-2 * 2.72**2) = 7e-7."""
    gaps = np.sort(np.diff(times_of(Arrivals(rate=50))))
    expected = 1 - np.exp(-50 * gaps)
    steps = np.arange(len(gaps) + 1) / len(gaps)
    worst = max(np.abs(expected - steps[1:]).max(), np.abs(expected - steps[:-1]).max())
    assert worst < 2.72 / math.sqrt(len(gaps))


def test_constant_is_evenly_spaced_across_chunks() -> None:
    times = times_of(Arrivals("constant", rate=100), 5.0, 45.0)
    assert len(times) == 4000 > 3 * CHUNK
    assert np.allclose(times, 5.0 + np.arange(4000) / 100)


def test_a_burst_is_so_much_denser_than_what_lies_outside() -> None:
    """Each count of an expected n within 5 standard deviations: odds 6e-7 each."""
    times = times_of(PERIODIC[0])
    quiet_rate = 50 * 10 / (9 + 5 * 1)
    within = int((times % 10 >= 9).sum())
    for count, expected in ((within, quiet_rate * 5 * 40), (len(times) - within, quiet_rate * 9 * 40)):
        assert abs(count - expected) < 5 * math.sqrt(expected)


def test_a_day_begins_at_its_lowest_and_is_highest_in_its_middle() -> None:
    """Ten parts of a day, each of an expected n within 5 standard deviations: odds 6e-6 of any."""
    swing = (1 - 0.2) / (1 + 0.2)
    parts = np.histogram(times_of(PERIODIC[1]) % 20 / 20, bins=10, range=(0, 1))[0]
    edges = np.linspace(0, 1, 11)
    expected = 20_000 * np.diff(edges - swing * np.sin(2 * np.pi * edges) / (2 * np.pi))
    assert (np.abs(parts - expected) < 5 * np.sqrt(expected)).all()


@pytest.mark.parametrize("arrivals", PERIODIC, ids=lambda arrivals: str(arrivals.process))
def test_a_whole_period_expects_exactly_the_mean_rate(arrivals: Arrivals) -> None:
    """Evenly numbered arrivals meet the periods' ends: no drift, to rounding."""
    period_s = arrivals.burst_every_s if arrivals.process == "bursts" else arrivals.period_s
    per_period = arrivals.rate * period_s
    assert np.allclose(_when(arrivals, np.arange(100.0) * per_period), np.arange(100) * period_s)


def test_bursts_of_factor_one_and_days_without_night_are_poisson() -> None:
    plain = times_of(Arrivals(rate=50), ends_s=40)
    assert np.allclose(times_of(Arrivals("bursts", rate=50, burst_factor=1), ends_s=40), plain)
    assert np.allclose(times_of(Arrivals("diurnal", rate=50, trough=1), ends_s=40), plain)


def test_another_rate_only_stretches_time() -> None:
    slow, fast = times_of(Arrivals(rate=10), ends_s=40), times_of(Arrivals(rate=20), ends_s=20)
    assert np.allclose(slow, fast * 2)


def test_the_shorter_run_is_the_beginning_of_the_longer() -> None:
    longer, shorter = times_of(Arrivals(rate=100), ends_s=100), times_of(Arrivals(rate=100), ends_s=30)
    assert np.array_equal(shorter, longer[: len(shorter)])
    assert longer[len(shorter)] >= 30


def test_arrivals_without_end_are_drawn_as_they_are_taken() -> None:
    endless = arrival_times(Arrivals(rate=1000), 0.0, math.inf, stream(1, "flow", "arrivals"))
    assert len(list(itertools.islice(endless, 5000))) == 5000


def trace_file(folder: Path, *lines: str) -> Path:
    path = folder / f"trace-{len(lines)}.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.mark.parametrize("number", [1, 3, CHUNK, CHUNK + 1])
def test_a_trace_is_played_as_recorded_and_at_its_speed(tmp_path: Path, number: int) -> None:
    path = trace_file(tmp_path, *(json.dumps({"at_s": place / 100}) for place in range(number)))
    recorded = np.arange(number) / 100
    assert np.allclose(times_of(Arrivals("trace", trace=path), 5.0), 5.0 + recorded)
    assert np.allclose(times_of(Arrivals("trace", trace=path, speed=4)), recorded / 4)
    assert len(times_of(Arrivals("trace", trace=path), 0.0, 0.01)) == 1


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (["", ""], "a trace without a request"),
        (['{"at_s": 1}', "{"], "line 2: not JSON"),
        (['{"at_s": 1}', '{"at_s": 0.5}'], "line 2: at_s = 0.5 is before the line above"),
        (['{"model": 1}'], "line 1: must be an object with at_s"),
        (['{"at_s": 1, "text": "x"}'], "line 1: must be an object with at_s, and maybe model, prompt_tokens"),
        (['{"at_s": true}'], "line 1: at_s = True: must be a number of seconds"),
        (['{"at_s": NaN}'], "line 1: at_s = nan"),
        (['{"at_s": 0, "model": -1}'], "line 1: model = -1: must be a whole number, at least 0"),
        (['{"at_s": 0, "output_tokens": 0}'], "line 1: output_tokens = 0: must be a whole number, at least 1"),
    ],
)
def test_a_broken_trace_is_refused_with_its_line(tmp_path: Path, lines: list[str], said: str) -> None:
    with pytest.raises(BadPlan) as caught:
        times_of(Arrivals("trace", trace=trace_file(tmp_path, *lines)))
    assert said in str(caught.value)
