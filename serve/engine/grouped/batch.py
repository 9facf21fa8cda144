"""The rows of one step: which tokens, of which sequence, under which slot's weights.

A *row* is one token to compute. Rows are sorted by slot, so the rows of one model form a *group* and a weight
matrix is read once a step however many sequences use it. All numbers lie in one buffer, so that one copy takes
them to the device, and a step can be repeated with other numbers at the same addresses.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from serve.engine.backend import Span

SHORTEST = 64  # positions: a tweet and its prompt


@dataclass(frozen=True, slots=True)
class StepSize:
    """The shapes of a step: two steps of one size differ in numbers alone.

    The sequences of one-token spans attend together, over the first `length` positions of the KV cache rows
    ``0 .. cache_rows - 1``, each from where it lies, so that no key is copied.
    """

    rows: int
    heads: int  # rows whose logits are wanted; all of them where it is equal to `rows`
    cache_rows: int
    length: int

    @classmethod
    def of(cls, spans: Sequence[Span], n_positions: int) -> StepSize:
        """The size of a step that may hold longer spans."""
        rows = sum(len(span.token_ids) for span in spans)
        past = [span.past for span in spans if len(span.token_ids) == 1]
        cache_rows = max(span.kv_row for span in spans) + 1 if past else 0
        return cls(rows, sum(map(_num_heads, spans)), cache_rows, _bucket_of_length(past, n_positions))

    @classmethod
    def padded(cls, spans: Sequence[Span], num_kv_rows: int, n_positions: int) -> StepSize:
        """A size for one-token spans, of few: powers of two, and all logits."""
        rows = min(_next_power_of_two(len(spans)), num_kv_rows)
        cache_rows = max(rows, min(_next_power_of_two(max(span.kv_row for span in spans) + 1), num_kv_rows))
        return cls(rows, rows, cache_rows, _bucket_of_length([span.past for span in spans], n_positions))


@dataclass(frozen=True, slots=True)
class Batch:
    """The inputs of one step: views into `buffer`, all int64, one after another in the order of the fields."""

    size: StepSize
    buffer: Tensor
    token_ids: Tensor  # (R,)
    positions: Tensor  # (R,)
    row_slots: Tensor  # (R,)
    kv_rows: Tensor  # (R,)
    queries: Tensor  # (C,): the row that attends to each KV cache row; where none does, any
    lengths: Tensor  # (C,): the tokens that it sees there, its own included
    ends: Tensor  # (num_slots,): exclusive end of every slot's rows, empty groups included
    head_rows: Tensor  # (N,)
    head_ends: Tensor  # (num_slots,)

    @classmethod
    def empty(cls, size: StepSize, num_slots: int, device: torch.device, *, pinned: bool = False) -> Batch:
        """A batch without numbers. `pinned`: in memory of the host from which a device copies by itself."""
        rows, cache_rows = size.rows, size.cache_rows
        counts = [rows, rows, rows, rows, cache_rows, cache_rows, num_slots, size.heads, num_slots]
        buffer = torch.zeros(sum(counts), dtype=torch.int64, device=device, pin_memory=pinned)
        return cls(size, buffer, *torch.split(buffer, counts))

    def to(self, device: torch.device) -> Batch:
        """The same batch there."""
        copy = Batch.empty(self.size, len(self.ends), device)
        copy.buffer.copy_(self.buffer, non_blocking=True)
        return copy

    def fill(self, spans: Sequence[Span]) -> None:
        """Set the numbers, of a batch on the host, from spans sorted by slot, each of another KV cache row.

        Rows beyond the last span's repeat the last row: they store the key that it stores and get the logits that
        it gets, so they need no place of their own and disturb nobody.
        """
        first = 0
        heads: list[int] = []
        kv_rows, queries, lengths = self.kv_rows.numpy(), self.queries.numpy(), self.lengths.numpy()
        token_ids, positions, row_slots = self.token_ids.numpy(), self.positions.numpy(), self.row_slots.numpy()
        queries[:], lengths[:] = 0, 1
        for span in spans:
            end = first + len(span.token_ids)
            token_ids[first:end] = span.token_ids
            positions[first:end] = range(span.past, span.past + end - first)
            row_slots[first:end] = span.slot
            kv_rows[first:end] = span.kv_row
            if end - first == 1:
                queries[span.kv_row], lengths[span.kv_row] = first, span.past + 1
            heads.extend(range(end - _num_heads(span), end))
            first = end
        for numbers in (token_ids, positions, row_slots, kv_rows):
            numbers[first:] = numbers[first - 1]
        assert (np.diff(row_slots) >= 0).all(), "spans must be sorted by slot"
        slots = np.arange(len(self.ends))
        self.ends.numpy()[:] = np.searchsorted(row_slots, slots, side="right")
        head_rows = self.head_rows.numpy()
        head_rows[:] = heads if len(heads) == len(head_rows) else np.arange(len(head_rows))
        self.head_ends.numpy()[:] = np.searchsorted(row_slots[head_rows], slots, side="right")


@dataclass(frozen=True, slots=True)
class Prompts:
    """Spans of more than one row that attend together: S of them, each padded to T rows by its last one."""

    rows: Tensor  # (S * T,) int64: where they are in the batch
    kv_rows: Tensor  # (S,) int64
    mask: Tensor  # (S, 1, T, length) bool: True where a key may be seen

    @classmethod
    def of(cls, spans: Sequence[tuple[int, Span]], length: int, device: torch.device) -> Prompts:
        """`spans`: each with its first row; `length` positions are enough for all."""
        first, count, past, kv_rows = np.array(
            [(row, len(span.token_ids), span.past, span.kv_row) for row, span in spans], dtype=np.int64
        ).T
        within = np.minimum(np.arange(count.max()), count[:, None] - 1)  # (S, T)
        numbers = np.stack([first[:, None] + within, past[:, None] + within])
        rows, last = torch.from_numpy(numbers).to(device)  # `last`: of the positions that each row sees
        mask = torch.arange(length, device=device) <= last[:, None, :, None]
        return cls(rows.flatten(), torch.from_numpy(kv_rows.copy()).to(device), mask)


def prompts_of(spans: Iterable[Span], n_positions: int, device: torch.device) -> list[Prompts]:
    """The spans of more than one row, with those of about one length together, so that padding is less than half."""
    alike: dict[tuple[int, int], list[tuple[int, Span]]] = {}
    first = 0
    for span in spans:
        count = len(span.token_ids)
        if count > 1:
            length = _bucket_of_length([span.past + count - 1], n_positions)
            alike.setdefault((_next_power_of_two(count), length), []).append((first, span))
        first += count
    return [Prompts.of(found, length, device) for (_, length), found in alike.items()]


def _num_heads(span: Span) -> int:
    return len(span.token_ids) if span.wants_all_logits else int(span.wants_logits)


def _bucket_of_length(past: Sequence[int], n_positions: int) -> int:
    longest = max(past, default=0) + 1
    return min(max(SHORTEST, _next_power_of_two(longest)), n_positions)


def _next_power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()
