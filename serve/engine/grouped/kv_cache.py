"""Keys and values of all running sequences: one fixed row each, ragged lengths, nothing allocated per step."""

from __future__ import annotations

import torch
from torch import Tensor

from serve.engine.memory import zeros
from serve.shape import GPT2Shape


class KVCache:
    """``(n_layer, num_rows, n_head, n_positions, head_dim)`` for keys and for values.

    Unused rows and positions cost a CPU address space alone.

    NOTE: everything in here must be finite, also beyond a sequence's length: a masked key still meets a softmax
    weight of 0, and 0 x NaN is NaN. Hence zeros at the start, and `clear` after each sequence.
    """

    def __init__(self, shape: GPT2Shape, num_rows: int, dtype: torch.dtype, device: torch.device) -> None:
        size = (shape.n_layer, num_rows, shape.n_head, shape.n_positions, shape.head_dim)
        self.num_rows = num_rows
        self._keys = zeros(size, dtype, device)
        self._values = zeros(size, dtype, device)

    def write(self, layer: int, kv_rows: Tensor, positions: Tensor, keys: Tensor, values: Tensor) -> None:
        """Store each row's ``(R, H, hd)`` key and value at its sequence's row and position."""
        self._keys[layer][kv_rows, :, positions] = keys
        self._values[layer][kv_rows, :, positions] = values

    def view(self, layer: int, num_rows: int, length: int) -> tuple[Tensor, Tensor]:
        """The first `length` keys and values of the first rows: two ``(num_rows, H, length, hd)`` views."""
        return self._keys[layer, :num_rows, :, :length], self._values[layer, :num_rows, :, :length]

    def gather(self, layer: int, rows: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """The first `length` keys and values of some rows: two ``(B, H, length, hd)`` copies."""
        keys, values = self.view(layer, self.num_rows, length)
        return keys.index_select(0, rows), values.index_select(0, rows)

    def clear(self, row: int, length: int) -> None:
        """Forget the first `length` keys and values of a sequence: even finite weights can make an infinite key."""
        self._keys[:, row, :, :length].zero_()
        self._values[:, row, :, :length].zero_()
