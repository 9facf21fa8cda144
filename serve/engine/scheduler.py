"""Which sequences take part in the next step: continuous batching with chunked prefill.

Knows sequences and KV cache rows; no tensors. A sequence joins at the next step and leaves when done.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

from serve.engine.batch import Span
from serve.engine.sequence import Sequence


class Scheduler:
    """First come, first served into `num_rows` KV cache rows; at most about `max_step_rows` tokens a step.

    Every decoding sequence is in every step; prompts share what is left, so a long one stalls nobody.
    """

    def __init__(self, *, num_rows: int, max_step_rows: int) -> None:
        self._max_step_rows = max_step_rows
        self._free_rows = list(range(num_rows - 1, -1, -1))
        self._waiting: deque[Sequence] = deque()
        self._running: list[Sequence] = []

    def __repr__(self) -> str:
        return f"<Scheduler running={len(self._running)} waiting={len(self._waiting)} free={len(self._free_rows)}>"

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def is_idle(self) -> bool:
        return not self._waiting and not self._running

    def add(self, sequences: Iterable[Sequence]) -> None:
        self._waiting.extend(sequences)

    def cancelled(self) -> list[Sequence]:
        """The sequences to be taken out, running or not."""
        return [s for s in (*self._waiting, *self._running) if s.cancelled]

    def remove(self, sequence: Sequence) -> None:
        """A sequence is done: its KV cache row, if it has one, is free again."""
        if sequence.kv_row < 0:
            self._waiting.remove(sequence)
            return
        self._running.remove(sequence)
        self._free_rows.append(sequence.kv_row)
        sequence.kv_row = -1

    def schedule(self) -> list[tuple[Sequence, Span]]:
        """The spans of the next step, sorted by slot."""
        while self._waiting and self._free_rows:
            sequence = self._waiting.popleft()
            sequence.kv_row = self._free_rows.pop()
            self._running.append(sequence)
        decoding = [s for s in self._running if s.num_computed >= len(s.prompt_ids)]
        budget = max(1, self._max_step_rows - len(decoding))
        chosen = [(s, _span(s, 1)) for s in decoding]
        for sequence in self._running:
            if budget > 0 and sequence.num_computed < len(sequence.prompt_ids):
                span = _span(sequence, budget)
                budget -= len(span.token_ids)
                chosen.append((sequence, span))
        return sorted(chosen, key=lambda pair: pair[1].slot)


def _span(sequence: Sequence, limit: int) -> Span:
    tokens = sequence.next_tokens(limit)
    completes = sequence.num_computed + len(tokens) == sequence.num_tokens
    prefilling = sequence.num_computed < len(sequence.prompt_ids)
    return Span(
        slot=sequence.slot,
        kv_row=sequence.kv_row,
        past=sequence.num_computed,
        token_ids=tokens,
        wants_all_logits=sequence.prompt_logprobs and prefilling,
        wants_logits=completes,
    )
