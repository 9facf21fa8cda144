"""The rows of one step: which tokens, of which sequence, under which slot's weights.

A *row* is one token to compute. Rows are sorted by slot, so the rows of one model form a *group* and a
weight matrix is read once a step however many sequences use it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Groups:
    """Rows sorted by slot, as group bounds: rows ``bounds[i]:bounds[i+1]`` use ``slots[i]`` (ascending)."""

    slots: tuple[int, ...]
    bounds: tuple[int, ...]
    row_slots: Tensor  # (R,) int64: the slot of each row
    ends: Tensor  # (num_slots,) int32: exclusive end of every slot's rows, empty groups included

    @classmethod
    def of(cls, row_slots: Sequence[int], num_slots: int, device: torch.device) -> Groups:
        """Groups of `row_slots`, which must be ascending."""
        slots: list[int] = []
        bounds = [0]
        for row, slot in enumerate(row_slots):
            if not slots or slots[-1] != slot:
                assert not slots or slot > slots[-1], "rows must be sorted by slot"
                if slots:
                    bounds.append(row)
                slots.append(slot)
        bounds.append(len(row_slots))
        rows = torch.tensor(row_slots, dtype=torch.int64)
        ends = torch.bincount(rows, minlength=num_slots).cumsum(0).to(torch.int32)
        return cls(tuple(slots), tuple(bounds), rows.to(device), ends.to(device))


@dataclass(frozen=True, slots=True)
class Span:
    """Consecutive rows of one sequence: tokens at positions ``past .. past + num_rows - 1``."""

    slot: int
    kv_row: int
    past: int  # tokens already in the KV cache
    token_ids: Sequence[int]
    wants_all_logits: bool = False  # of every row, not of the last alone
    wants_logits: bool = True


@dataclass(frozen=True, slots=True)
class Batch:
    """The inputs of one forward pass, built from spans sorted by slot.

    ``head_rows`` are the rows whose logits are wanted. Spans of one row (decoding) come as a list for a CPU, which
    attends to each by itself, and as tensors for a device, which attends to all in one call.
    """

    token_ids: Tensor  # (R,) int64
    positions: Tensor  # (R,) int64
    kv_rows: Tensor  # (R,) int64
    groups: Groups
    head_rows: Tensor  # (N,) int64
    head_groups: Groups
    decode: tuple[tuple[int, int, int], ...]  # (row, kv row, length) of each span of one row
    decode_rows: Tensor  # (B,) int64: rows of the spans of one row
    decode_kv: Tensor  # (B,) int64: their KV cache rows
    decode_mask: Tensor  # (B, 1, 1, longest) bool: True where a key may be seen
    prefill: tuple[tuple[int, int, int, int], ...]  # (first row, end row, kv row, past) of each longer span

    @classmethod
    def of(cls, spans: Sequence[Span], num_slots: int, device: torch.device) -> Batch:
        """Rows in the order of `spans`, which must be sorted by slot."""
        ids: list[int] = []
        positions: list[int] = []
        kv_rows: list[int] = []
        row_slots: list[int] = []
        head_rows: list[int] = []
        decode: list[tuple[int, int, int]] = []
        prefill: list[tuple[int, int, int, int]] = []
        for span in spans:
            first, count = len(ids), len(span.token_ids)
            ids.extend(span.token_ids)
            positions.extend(range(span.past, span.past + count))
            kv_rows.extend([span.kv_row] * count)
            row_slots.extend([span.slot] * count)
            if span.wants_all_logits:
                head_rows.extend(range(first, first + count))
            elif span.wants_logits:
                head_rows.append(first + count - 1)
            if count == 1:
                decode.append((first, span.kv_row, span.past + 1))
            else:
                prefill.append((first, first + count, span.kv_row, span.past))
        lengths = torch.tensor([length for _, _, length in decode], dtype=torch.int64)
        longest = max((length for _, _, length in decode), default=0)
        mask = (torch.arange(longest) < lengths[:, None])[:, None, None, :]
        kv = torch.tensor(kv_rows, dtype=torch.int64)
        decode_rows = torch.tensor([row for row, _, _ in decode], dtype=torch.int64)
        return cls(
            token_ids=torch.tensor(ids, dtype=torch.int64).to(device),
            positions=torch.tensor(positions, dtype=torch.int64).to(device),
            kv_rows=kv.to(device),
            groups=Groups.of(row_slots, num_slots, device),
            head_rows=torch.tensor(head_rows, dtype=torch.int64).to(device),
            head_groups=Groups.of([row_slots[row] for row in head_rows], num_slots, device),
            decode=tuple(decode),
            decode_rows=decode_rows.to(device),
            decode_kv=kv[decode_rows].to(device),
            decode_mask=mask.to(device),
            prefill=tuple(prefill),
        )
