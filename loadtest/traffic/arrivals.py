"""When requests arrive, whatever becomes of them. It knows nothing of what they ask.

Every process is a stream of arrivals at rate one (evenly spaced, or at exponential distances) whose clock is then
stretched: an arrival whose number is s comes when the expected number of arrivals has reached s. Of exponential
distances that makes a Poisson process of any varying rate, exactly; unlike thinning it throws no draw away, so the
same seed gives the same requests in the same order at another rate. Source: Çinlar, Introduction to Stochastic
Processes (1975), section 4.7.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from loadtest.traffic.plan import Arrivals
from loadtest.traffic.trace import read_trace

Floats: TypeAlias = NDArray[np.float64]

CHUNK = 1024  # arrivals drawn at once: numpy's cost per call is then nothing, and a chunk takes well below 1 ms
_STEPS_OF_A_DAY = 4096  # the rate of a day is taken as constant within each: it errs by less than 1e-6


def arrival_times(arrivals: Arrivals, begins_s: float, ends_s: float, rng: np.random.Generator) -> Iterator[float]:
    """Seconds from the start of the run, in order, from `begins_s` on and below `ends_s`; of an open-loop process."""
    for chunk in arrival_chunks(arrivals, begins_s, ends_s, rng):
        yield from chunk.tolist()


def arrival_chunks(arrivals: Arrivals, begins_s: float, ends_s: float, rng: np.random.Generator) -> Iterator[Floats]:
    """`arrival_times`, up to `CHUNK` at once: (n,) each."""
    assert arrivals.process != "closed", "clients of a closed loop ask when they have their answer"
    assert arrivals.times_capacity is None, "to be resolved before"
    for numbers in _numbers(arrivals, rng):
        times = begins_s + _when(arrivals, numbers)
        yield times[: np.searchsorted(times, ends_s)]
        if len(times) < CHUNK or times[-1] >= ends_s:
            return


def _numbers(arrivals: Arrivals, rng: np.random.Generator) -> Iterator[Floats]:
    """How many arrivals are expected before each; of a trace, its times."""
    if arrivals.process == "trace":
        assert arrivals.trace is not None
        at_s = read_trace(arrivals.trace).at_s
        yield from (at_s[start : start + CHUNK] for start in range(0, len(at_s) + 1, CHUNK))
        return
    elif arrivals.process == "constant":
        yield from (np.arange(start, start + CHUNK, dtype=np.float64) for start in itertools.count(0, CHUNK))
    last = 0.0
    while True:
        numbers: Floats = last + np.cumsum(rng.standard_exponential(CHUNK))
        last = float(numbers[-1])
        yield numbers


def _when(arrivals: Arrivals, numbers: Floats) -> Floats:
    """The time, from the flow's beginning, by which so many arrivals are expected."""
    match arrivals.process:
        case "trace":
            return numbers / arrivals.speed
        case "bursts":
            return _periodic(numbers / arrivals.rate, arrivals.burst_every_s, *_bursts(arrivals))
        case "diurnal":
            return _periodic(numbers / arrivals.rate, arrivals.period_s, *_day(arrivals.trough))
    return numbers / arrivals.rate


def _periodic(times: Floats, period_s: float, times_of_period: Floats, shares: Floats) -> Floats:
    """Times at an even rate -> times at a repeating rate: `shares` of a period's come by `times_of_period` (0 to 1)."""
    whole, rest = np.divmod(times / period_s, 1.0)
    return period_s * (whole + np.interp(rest, shares, times_of_period))


def _bursts(arrivals: Arrivals) -> tuple[Floats, Floats]:
    """A burst is the end of its period, so that the first does not meet a server that is just starting."""
    quiet = 1 - arrivals.burst_s / arrivals.burst_every_s  # share of time
    share = quiet / (quiet + arrivals.burst_factor * (1 - quiet))  # of arrivals
    return np.array([0, quiet, 1]), np.array([0, share, 1])


def _day(trough: float) -> tuple[Floats, Floats]:
    """The rate goes as 1 - swing * cos: a day begins at its lowest."""
    swing = (1 - trough) / (1 + trough)
    times = np.linspace(0, 1, _STEPS_OF_A_DAY + 1)
    return times, times - swing * np.sin(2 * np.pi * times) / (2 * np.pi)
