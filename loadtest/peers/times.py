"""How long the runs of a round are, so that all rounds fit into the budget.

A round is planned with what the one before took, the first with what was measured on two quiet cores. So who starts
slowly makes the later runs shorter, for all alike, and takes no run from anybody else.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

AROUND_S = 4.5  # of a number of models: the first requests, and the last answers of both runs
PATIENCE = 1.6  # so many times as long as planned a turn may be before what is left of it is given up
SPARE = 0.03  # of the time that is left, for what takes longer than it did
BUSY_PART = 0.3  # of the time for the two runs: tokens a second are known soon
LEAST_S = 1.0
MOST_BUSY_S, MOST_LIGHT_S = 5.0, 120.0
RAMP_S = 1.0  # of a saturating run, before it counts; not within its length


@dataclass(frozen=True, slots=True)
class RunTimes:
    """Seconds of a light and of a saturating run."""

    light_s: float = LEAST_S
    busy_s: float = LEAST_S

    @property
    def both_s(self) -> float:
        return self.light_s + RAMP_S + self.busy_s


def times_of_round(left_s: float, num_rounds: int, num_counts: int, around_s: Mapping[str, float]) -> RunTimes:
    """Of the next of `num_rounds` rounds in `left_s`. `around_s`: by server, what of its turn is none of its runs."""
    pairs_s = left_s * (1 - SPARE) / num_rounds - sum(around_s.values())
    runs_s = pairs_s / max(1, len(around_s) * num_counts) - RAMP_S
    busy_s = min(MOST_BUSY_S, max(LEAST_S, BUSY_PART * runs_s))
    return RunTimes(min(MOST_LIGHT_S, max(LEAST_S, runs_s - busy_s)), busy_s)
