"""What every contender of a benchmark is asked to do, and the rounds in which they take turns.

It knows no contender: each says how many tokens a second it made of a case.
"""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

PROMPT_IDS = (50256, 3666, 4320, 318)  # "<|endoftext|>My dream is" in GPT-2's vocabulary
NUM_MODELS = 8
SHORTEST_RUN_TOKENS = 180  # a case that asks for fewer is run again at once, and the rate taken over all of it


@dataclass(frozen=True, slots=True)
class Work:
    """One request. Nobody stops at the end of text."""

    prompt_ids: tuple[int, ...] = PROMPT_IDS
    num_tokens: int = 60
    top_p: float = 0.95
    temperature: float = 1.0

    def completion(self, model_id: str, seed: int) -> dict[str, object]:
        """The body of an OpenAI completion request for it."""
        return {
            "model": model_id,
            "prompt": list(self.prompt_ids),
            "max_tokens": self.num_tokens,
            "min_tokens": self.num_tokens,
            "top_p": self.top_p,
            "temperature": self.temperature,
            "seed": seed,
        }


@dataclass(frozen=True, slots=True)
class Case:
    """`streams` requests at once to each of `models` models."""

    name: str
    models: int
    streams: int


CASES = (
    Case("1", 1, 1),
    Case("8", 1, 8),
    Case("32", 1, 32),
    Case("8x1", NUM_MODELS, 1),
    Case("8x4", NUM_MODELS, 4),
)


class PeerUnavailableError(Exception):
    """A contender that cannot be had here; the message is the reason that the report prints."""


class Contender(Protocol):
    """Someone who can do the work."""

    name: str
    cases: frozenset[str]

    def run(self, case: Case, work: Work, seed: int) -> int:
        """Do the case once; the number of tokens made."""
        ...


class Rounds:
    """Tokens a second by contender and case, one figure a round."""

    def __init__(self, contenders: Sequence[Contender], work: Work) -> None:
        self.contenders = tuple(contenders)
        self.rates: dict[tuple[str, str], list[float]] = defaultdict(list)
        self._work = work

    @property
    def num_taken(self) -> int:
        return max(map(len, self.rates.values()), default=0)

    def warm_up(self) -> None:
        """Every case once, of few tokens."""
        few = replace(self._work, num_tokens=min(4, self._work.num_tokens))
        for case, contender in self._turns():
            contender.run(case, few, seed=0)

    def take(self, between: Callable[[], object]) -> None:
        """One round: case after case, in each all contenders one after another, with `between` before each turn."""
        for case, contender in self._turns():
            between()
            self.rates[contender.name, case.name].append(self._rate(contender, case))

    def median(self, name: str, case: str) -> float | None:
        rates = self.rates.get((name, case))
        return statistics.median(rates) if rates else None

    def ratio(self, ours: str, theirs: str, case: str, their_case: str | None = None) -> float | None:
        """Median of the ratios of the same round."""
        pairs = zip(self.rates.get((ours, case), ()), self.rates.get((theirs, their_case or case), ()), strict=False)
        ratios = [a / b for a, b in pairs]
        return statistics.median(ratios) if ratios else None

    def _turns(self) -> Iterator[tuple[Case, Contender]]:
        for case in CASES:
            for contender in self.contenders:
                if case.name in contender.cases:
                    yield case, contender

    def _rate(self, contender: Contender, case: Case) -> float:
        repeats = -(-SHORTEST_RUN_TOKENS // (self._work.num_tokens * case.models * case.streams))
        first = 1000 * self.num_taken
        started = time.perf_counter()
        count = sum(contender.run(case, self._work, first + repeat) for repeat in range(repeats))
        return count / (time.perf_counter() - started)
