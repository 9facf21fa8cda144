"""A scheduler at work without an engine: steps take what weights and rows would cost, in time that is only counted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

from serve.engine.scheduler import WEIGHT_ROWS, Scheduler
from serve.engine.sequence import Sequence
from serve.engine.text import Vocabulary
from serve.types import SamplingParams

STEP = WEIGHT_ROWS + 1.0  # what one row of one model takes: the unit of all times here


def sequence(slot: int = 0, *, caller: str = "", prompt: int = 5, new: int = 60) -> Sequence:
    vocabulary = cast(Vocabulary, None)  # no text is made here
    return Sequence(
        slot=slot,
        prompt_ids=range(prompt),
        params=SamplingParams(max_new_tokens=new),
        vocabulary=vocabulary,
        caller=caller,
    )


class Stepping:
    """Runs sequences to their length. `now` is counted in steps of one row of one model."""

    def __init__(self, *, num_rows: int = 64, max_step_rows: int = 128) -> None:
        self.lost: list[tuple[int, int]] = []
        self.scheduler = Scheduler(
            num_rows=num_rows, max_step_rows=max_step_rows, forget=lambda row, length: self.lost.append((row, length))
        )
        self.now = 0.0
        self.num_tokens = 0
        self.stepped: list[Sequence] = []  # in the last step
        self.began: dict[Sequence, float] = {}
        self.ended: dict[Sequence, float] = {}
        self.computed_until: dict[int, int] = {}  # KV cache row -> tokens in it
        self.when_ended: dict[Sequence, Callable[[], Any]] = {}

    def add(self, *sequences: Sequence) -> None:
        self.began |= dict.fromkeys(sequences, self.now)
        self.scheduler.add(sequences)

    def step(self) -> None:
        """One step, with the engine's own checks of what it is given."""
        chosen = self.scheduler.schedule()
        assert chosen or self.scheduler.is_idle, "work is left, and nobody does any"
        slots = [span.slot for _, span in chosen]
        assert slots == sorted(slots)
        rows = [span.kv_row for _, span in chosen]
        assert len(set(rows)) == len(rows) and -1 not in rows
        num_tokens = sum(len(span.token_ids) for _, span in chosen)
        self.now += (WEIGHT_ROWS * len(set(slots)) + num_tokens) / STEP
        self.stepped = [sequence for sequence, _ in chosen]
        for one, span in chosen:
            assert span.past == one.num_computed and span.token_ids
            one.computed(len(span.token_ids))
            assert span.wants_logits == (one.num_left == 0)
            if span.wants_logits:
                self._sample(one)

    def _sample(self, one: Sequence) -> None:
        one.output_ids.append(0)
        self.num_tokens += 1
        if len(one.output_ids) == one.params.max_new_tokens:
            self.scheduler.remove(one)
            self.ended[one] = self.now
            self.when_ended.get(one, lambda: None)()

    def run(self, *awaited: Sequence) -> float:
        """Steps until all of these are done; how long the slowest took since it was added."""
        while not all(one in self.ended for one in awaited):
            self.step()
        return max(self.ended[one] - self.began[one] for one in awaited)

    def keep_busy(self, num_streams: int, make: Callable[[], Sequence]) -> None:
        """`num_streams` clients, each of which asks again as soon as it is answered."""

        def ask() -> None:
            one = make()
            self.when_ended[one] = ask
            self.add(one)

        for _ in range(num_streams):
            ask()
