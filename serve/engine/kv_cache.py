"""Keys and values of all running sequences: one fixed row each, ragged lengths, nothing allocated per step."""

from __future__ import annotations

import torch
from torch import Tensor

from serve.engine.batch import Batch
from serve.engine.memory import zeros
from serve.shape import GPT2Shape


class KVCache:
    """``(n_layer, num_rows, n_head, n_positions, head_dim)`` for keys and for values.

    Unused rows and positions cost a CPU address space alone.

    NOTE: where `gather` is used, everything in here must be finite, also beyond a sequence's length: a masked key
    still meets a softmax weight of 0, and 0 x NaN is NaN. Hence zeros at the start, and `clear` after each sequence.
    """

    def __init__(self, shape: GPT2Shape, num_rows: int, dtype: torch.dtype, device: torch.device) -> None:
        size = (shape.n_layer, num_rows, shape.n_head, shape.n_positions, shape.head_dim)
        # Whether each sequence's keys are read where they lie (best on a CPU) or gathered for one call (on a device).
        self.in_place = device.type == "cpu"
        self._keys = zeros(size, dtype, device)
        self._values = zeros(size, dtype, device)

    def write(self, layer: int, batch: Batch, keys: Tensor, values: Tensor) -> None:
        """Store each row's ``(R, H, hd)`` key and value at its sequence's row and position."""
        self._keys[layer][batch.kv_rows, :, batch.positions] = keys
        self._values[layer][batch.kv_rows, :, batch.positions] = values

    def clear(self, row: int, length: int) -> None:
        """Forget the first `length` keys and values of a sequence: even finite weights can make an infinite key."""
        self._keys[:, row, :, :length].zero_()
        self._values[:, row, :, :length].zero_()

    def gather(self, layer: int, rows: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """The first `length` keys and values of several sequences: two ``(B, H, length, hd)`` copies."""
        return (
            self._keys[layer, :, :, :length].index_select(0, rows),
            self._values[layer, :, :, :length].index_select(0, rows),
        )

    def view(self, layer: int, row: int, length: int) -> tuple[Tensor, Tensor]:
        """The first `length` keys and values of one sequence: two ``(1, H, length, hd)`` views."""
        return self._keys[layer, row : row + 1, :, :length], self._values[layer, row : row + 1, :, :length]


def kv_bytes_per_row(shape: GPT2Shape, dtype: torch.dtype) -> int:
    """Bytes of one sequence's keys and values at full context."""
    return 2 * shape.n_layer * shape.n_positions * shape.n_embd * dtype.itemsize
