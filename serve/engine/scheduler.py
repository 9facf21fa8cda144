"""Which sequences take part in the next step: continuous batching with chunked prefill, shared out fairly.

Knows sequences and KV cache rows; no tensors. A sequence joins at the next step and leaves when done.

Callers and models (slots) are served equally by tokens: what a sequence's caller and its model have had, added up,
says how far ahead it is. Two things are scarce, and shared by one rule each:

- A KV cache row goes to who is least far ahead. Who finds none free takes one from who holds the most, if that is
  more than it holds itself; the sequence that loses it is computed anew later. So nobody waits for another's text
  to end, but where there are more callers and models than rows.
- A step's time: a step takes longer with each model and with each row. Who is ahead sits steps out, and rides along
  once those behind have had four times what that costs. They are thus slowed down by a quarter, however many rows
  the others have; and as a step reads a model's weights once for all its rows, a model that steps seldom, but with
  all its rows, loses no throughput.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from heapq import heappop, heappush
from itertools import count as numbers

from serve.engine.backend import Span
from serve.engine.fairness import TokenCounters
from serve.engine.sequence import Sequence

Chosen = list[tuple[Sequence, Span]]
Tenant = tuple[str, int]  # caller, slot

# Rows whose computing takes as long as reading a model's weights: 1 to 8 rows of GPT-2 small add 3.5 % each to a step
# (15.0 -> 18.7 ms in bf16 on two AMX cores), 8 models with 1 to 4 rows 4 % each. More on a GPU.
WEIGHT_ROWS = 24
RIDE_SHARE = 0.25  # of the time of those behind, for those ahead
SLACK = 8.0  # tokens that put nobody ahead yet: equals in company do not take turns for a token's sake
PROMPT_WEIGHT = 1 / 8  # a prompt's token beside a generated one: it shares its read of the weights with others


class Scheduler:
    """Shares `num_rows` KV cache rows and steps of at most about `max_step_rows` tokens.

    Every decoding sequence that may step does; prompts share what is left, so a long one stalls nobody.
    `forget(kv_row, length)` is called for a row that a sequence has lost.
    """

    def __init__(
        self, *, num_rows: int, max_step_rows: int, forget: Callable[[int, int], None] = lambda row, length: None
    ) -> None:
        self._max_step_rows = max_step_rows
        self._forget = forget
        self._free_rows = list(range(num_rows))  # a heap: a device attends over all rows up to the highest in use
        self._waiting: dict[Tenant, deque[Sequence]] = {}
        self._running: list[Sequence] = []  # of those ahead, the longest not stepped first
        self._admitted: dict[Sequence, int] = {}  # when each of them got its row, as a running number
        self._numbers = numbers()
        self._callers: TokenCounters[str] = TokenCounters()
        self._models: TokenCounters[int] = TokenCounters()
        self._ride_credit = 0.0

    def __repr__(self) -> str:
        return f"<Scheduler running={len(self._running)} waiting={self.num_waiting} free={len(self._free_rows)}>"

    @property
    def num_waiting(self) -> int:
        return sum(map(len, self._waiting.values()))

    @property
    def is_idle(self) -> bool:
        return not self._waiting and not self._running

    def add(self, sequences: Iterable[Sequence]) -> None:
        for sequence in sequences:
            self._waiting.setdefault(_tenant(sequence), deque()).append(sequence)

    def cancelled(self) -> list[Sequence]:
        """The sequences to be taken out, running or not."""
        waiting = [s for queue in self._waiting.values() for s in queue if s.cancelled]
        return waiting + [s for s in self._running if s.cancelled]

    def remove(self, sequence: Sequence) -> None:
        """A sequence is done: its KV cache row, if it has one, is free again."""
        if sequence.kv_row < 0:
            self._unqueue(sequence)
        else:
            self._take_row(sequence)

    def schedule(self) -> Chosen:
        """The spans of the next step, sorted by slot."""
        self._admit()
        behind, ahead = self._split()
        chosen = _spans(behind, self._max_step_rows)
        self._ride_credit += RIDE_SHARE * _cost(chosen)
        chosen += self._riders(ahead, chosen)
        self._charge(chosen)
        return sorted(chosen, key=lambda pair: pair[1].slot)

    # --- KV cache rows ----------------------------------------------------------------------------------------

    def _admit(self) -> None:
        while self._waiting:
            if self._free_rows:
                tenant = min(self._waiting, key=lambda tenant: self._served(tenant) + self._held(tenant))
            else:
                tenant = min(self._waiting, key=self._held)
                victim = self._find_victim(tenant)
                if victim is None:
                    return
                self._preempt(victim)
            sequence = self._waiting[tenant][0]
            self._unqueue(sequence)
            self._give_row(sequence)

    def _served(self, tenant: Tenant) -> float:
        caller, slot = tenant
        return self._callers.served(caller) + self._models.served(slot)

    def _held(self, tenant: Tenant) -> int:
        """Rows, each of which is a token to come."""
        caller, slot = tenant
        return self._callers.members(caller) + self._models.members(slot)

    def _find_victim(self, tenant: Tenant) -> Sequence | None:
        """The newest sequence of who holds most in excess of what `tenant` will hold.

        NOTE: an exchange lessens the sum of the squares of rows by caller and by model; so exchanges come to an end.
        """
        caller, slot = tenant

        def excess(sequence: Sequence) -> int:
            callers = self._callers.members(sequence.caller) - self._callers.members(caller) - 1
            models = self._models.members(sequence.slot) - self._models.members(slot) - 1
            return callers * (sequence.caller != caller) + models * (sequence.slot != slot)

        victim = max(self._running, key=lambda s: (excess(s), self._admitted[s]), default=None)
        return victim if victim is not None and excess(victim) > 0 else None

    def _preempt(self, sequence: Sequence) -> None:
        self._take_row(sequence)
        sequence.restart()
        self._waiting.setdefault(_tenant(sequence), deque()).appendleft(sequence)

    def _give_row(self, sequence: Sequence) -> None:
        sequence.kv_row = heappop(self._free_rows)
        self._running.append(sequence)
        self._admitted[sequence] = next(self._numbers)
        self._callers.enter(sequence.caller)
        self._models.enter(sequence.slot)

    def _take_row(self, sequence: Sequence) -> None:
        self._forget(sequence.kv_row, sequence.num_tokens)  # a step that failed may have written more than is noted
        heappush(self._free_rows, sequence.kv_row)
        sequence.kv_row = -1
        self._running.remove(sequence)
        del self._admitted[sequence]
        self._callers.leave(sequence.caller)
        self._models.leave(sequence.slot)

    def _unqueue(self, sequence: Sequence) -> None:
        queue = self._waiting[_tenant(sequence)]
        queue.remove(sequence)
        if not queue:
            del self._waiting[_tenant(sequence)]

    # --- A step's time ----------------------------------------------------------------------------------------

    def _split(self) -> tuple[list[Sequence], list[Sequence]]:
        """The running sequences: those behind (never none), those ahead."""
        served = {tenant: self._served(tenant) for tenant in {_tenant(s) for s in self._running}}
        line = min(served.values(), default=0.0) + SLACK
        behind = [s for s in self._running if served[_tenant(s)] <= line]
        return behind, [s for s in self._running if served[_tenant(s)] > line]

    def _riders(self, ahead: list[Sequence], chosen: Chosen) -> Chosen:
        """Models ahead with all their rows, the one that has waited longest first, as far as time is earned."""
        riders: Chosen = []
        for slot in dict.fromkeys(s.slot for s in ahead):
            spans = _spans([s for s in ahead if s.slot == slot], self._max_step_rows - _num_rows(chosen + riders))
            cost = _cost(chosen + riders + spans) - _cost(chosen + riders)
            if cost > self._ride_credit:
                riding = {sequence for sequence, _ in riders}
                self._running.sort(key=riding.__contains__)
                return riders
            self._ride_credit -= cost
            riders += spans
        self._ride_credit = 0.0  # nobody is left whom it could serve
        return riders

    def _charge(self, chosen: Chosen) -> None:
        """Count the step's tokens, for callers as they are, for models in equal parts by callers.

        NOTE: thus a caller that floods a model does not put that model ahead, and its other callers with it.
        """
        tokens = [PROMPT_WEIGHT * (len(span.token_ids) - 1) + 1 for _, span in chosen]
        totals: dict[str, float] = {}
        for (sequence, _), count in zip(chosen, tokens, strict=True):
            totals[sequence.caller] = totals.get(sequence.caller, 0.0) + count
        self._callers.charge(totals)
        least = min(totals.values(), default=0.0)
        of_models: dict[int, float] = {}
        for (sequence, _), count in zip(chosen, tokens, strict=True):
            part = count * least / totals[sequence.caller]
            of_models[sequence.slot] = of_models.get(sequence.slot, 0.0) + part
        self._models.charge(of_models)


def _tenant(sequence: Sequence) -> Tenant:
    return sequence.caller, sequence.slot


def _cost(chosen: Chosen) -> int:
    """What a step of these takes, in rows."""
    return WEIGHT_ROWS * len({span.slot for _, span in chosen}) + _num_rows(chosen)


def _num_rows(chosen: Chosen) -> int:
    return sum(len(span.token_ids) for _, span in chosen)


def _spans(sequences: list[Sequence], max_rows: int) -> Chosen:
    """A token of every decoding sequence; chunks of prompts in what is left of `max_rows`, but at least one token."""
    chosen = [(s, _span(s, 1)) for s in sequences if s.num_left == 1]
    budget = max(1, max_rows - len(chosen))
    for sequence in sequences:
        if budget > 0 and sequence.num_left > 1:
            span = _span(sequence, budget)
            budget -= len(span.token_ids)
            chosen.append((sequence, span))
    return chosen


def _span(sequence: Sequence, limit: int) -> Span:
    tokens = sequence.next_tokens(limit)
    return Span(
        slot=sequence.slot,
        kv_row=sequence.kv_row,
        past=sequence.num_computed,
        token_ids=tokens,
        wants_all_logits=sequence.prompt_logprobs and sequence.is_new,
        wants_logits=len(tokens) == sequence.num_left,
    )
