"""Which requests a generator takes on: those that it can finish in time, before any work for them begins.

The time of a step is that of its models and its rows, by the rule that the scheduler shares steps by; how long a row
takes is measured. Callers are served equally, so a request waits for no more of another caller's than it asks itself.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from itertools import chain
from typing import NamedTuple

from serve.engine.scheduler import PROMPT_WEIGHT, WEIGHT_ROWS
from serve.engine.sequence import Sequence
from serve.errors import Overloaded

_FRESH = 0.02  # of a step's measure in what is known: the last fifty count, and a first one that is slow hardly does
_LONGEST_WAIT_S = 60.0  # that anybody is told


class Admission:
    """`max_running` texts are written at once, `max_waiting` may wait for that; a request may take `deadline_s`."""

    def __init__(self, *, max_running: int, max_waiting: int, deadline_s: float) -> None:
        self._max_running, self._max_waiting = max_running, max_waiting
        self._deadline_s = deadline_s
        self._unit_s = 0.0  # that a row takes of a step; too little at first, when nothing is known
        self._unbegun: list[list[_Text]] = []  # of each request that waits for its weights

    def note_step(self, num_rows: int, num_models: int, duration_s: float) -> None:
        """From the engine's thread, after each step."""
        self._unit_s += _FRESH * (duration_s / (WEIGHT_ROWS * num_models + num_rows) - self._unit_s)

    def check(self, caller: str, costs: list[float], begun: Iterable[Sequence]) -> None:
        """Whether texts of these `costs` can be taken on beside those `begun` and `unbegun`. Raises: Overloaded."""
        sequences = list(begun)
        self.check_queue(caller, sequences)  # once more: others have come while the model was looked for
        took_s = self._forecast_s(caller, costs, sequences)
        if took_s > self._deadline_s:
            raise Overloaded(
                f"With what is asked for already this would take {took_s:.0f} s; {self._deadline_s:g} s is the limit. "
                "Ask for fewer or shorter texts, or try again later.",
                retry_after_s=min(took_s - self._deadline_s, _LONGEST_WAIT_S),
            )

    @contextmanager
    def unbegun(self, caller: str, costs: list[float]) -> Iterator[None]:
        """The block in which texts that were taken on wait for their weights: then all may begin at once."""
        texts = [_Text(caller, cost) for cost in costs]
        self._unbegun.append(texts)
        try:
            yield
        finally:
            self._unbegun.remove(texts)

    def check_queue(self, caller: str, begun: Collection[Sequence]) -> None:
        """No more may wait than was said; who has less than an equal share of all places is let in even so.

        Needs not to know what is asked for: it can be asked before any work. Raises: Overloaded.
        """
        queued = [sequence for sequence in begun if sequence.kv_row < 0]
        unbegun = list(chain(*self._unbegun))
        num_free = self._max_running - (len(begun) - len(queued))
        num_waiting = len(queued) + max(0, len(unbegun) - num_free)
        if num_waiting < self._max_waiting:
            return
        by_caller = Counter(chain((text.caller for text in begun), (text.caller for text in unbegun)))
        share = (self._max_running + self._max_waiting) / len(by_caller.keys() | {caller})
        if by_caller[caller] >= share:
            num_tokens = sum(map(cost_of, queued)) + sum(text.cost for text in unbegun)
            raise Overloaded(
                f"{num_waiting} texts wait to be written here, and {self._max_waiting} may; try again soon.",
                retry_after_s=min(max(1.0, num_tokens * self._token_s(begun)), _LONGEST_WAIT_S),
            )

    def _forecast_s(self, caller: str, costs: list[float], sequences: list[Sequence]) -> float:
        """How long it would take until the last of them is written, if each becomes as long as it may."""
        owed = {caller: sum(costs)}
        for text in chain(map(_text_of, sequences), *self._unbegun):
            owed[text.caller] = owed.get(text.caller, 0.0) + text.cost
        shared = sum(min(cost, owed[caller]) for cost in owed.values())
        alone_s = max(costs) * (WEIGHT_ROWS + 1) * self._unit_s  # a step a token
        return max(alone_s, shared * self._token_s(sequences))

    def _token_s(self, sequences: Iterable[Sequence]) -> float:
        """Of a full batch with the models at hand, what one of its tokens takes."""
        num_models = max(1, len({sequence.slot for sequence in sequences if sequence.kv_row >= 0}))
        return self._unit_s * (WEIGHT_ROWS * num_models / self._max_running + 1)


class _Text(NamedTuple):
    """One that is to be written: for whom, and how many tokens are left of it."""

    caller: str
    cost: float


def _text_of(sequence: Sequence) -> _Text:
    return _Text(sequence.caller, cost_of(sequence))


def cost_of(sequence: Sequence) -> float:
    """What is left of it, in generated tokens."""
    return cost(sequence.num_left, sequence.params.max_new_tokens - len(sequence.output_ids))


def cost(num_prompt_tokens: int, num_new_tokens: int) -> float:
    return PROMPT_WEIGHT * num_prompt_tokens + num_new_tokens
