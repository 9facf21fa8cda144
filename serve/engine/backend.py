"""What the engine asks of a device: weights in slots, a KV cache, and a forward pass over both.

A *backend* serves one layout. It knows slots and cache rows, not model ids, budgets or sampling.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from serve.shape import GPT2Shape

WEIGHT_FORMATS = ("float32", "bfloat16", "int8")
_ITEM_BYTES = {"float32": 4, "bfloat16": 2}
_COLUMN_BYTES = 8  # of an int8 matrix: a float32 scale and an int32 sum for each output column


@dataclass(frozen=True, slots=True)
class Span:
    """Consecutive rows of one sequence: tokens at positions ``past .. past + num_rows - 1``."""

    slot: int
    kv_row: int
    past: int  # tokens already in the KV cache
    token_ids: Sequence[int]
    wants_all_logits: bool = False  # of every row, not of the last alone
    wants_logits: bool = True


class Backend(Protocol):
    """Places for the weights of `num_slots` models of one layout, and the step that uses them.

    `write` and `clear` may run in any thread, beside a step on other slots; `forward` and `forget` belong to
    the engine's thread.
    """

    num_slots: int

    def acquire(self) -> int:
        """A free slot number. Raises: IndexError when there is none (the caller budgets)."""
        ...

    def write(self, slot: int, tensors: Mapping[str, Tensor]) -> None:
        """Copy a model's tensors (canonical names, transformers' layout) into `slot`."""
        ...

    def clear(self, slot: int) -> None:
        """Free `slot`. Nobody may be using it."""
        ...

    def forward(self, spans: Sequence[Span]) -> Tensor:
        """``(N, V)`` float32 logits of the wanted rows, in the order of `spans`, which are sorted by slot.

        The tensor is the caller's until the next call.
        """
        ...

    def forget(self, kv_row: int, length: int) -> None:
        """A sequence of `length` tokens ended; its KV cache row goes to another."""
        ...


class Slots:
    """Free slot numbers, lowest first, so that a half-empty slab stays dense."""

    def __init__(self, num_slots: int) -> None:
        self._free = set(range(num_slots))
        self._lock = threading.Lock()

    def acquire(self) -> int:
        """Raises: IndexError when all are taken."""
        with self._lock:
            if not self._free:
                raise IndexError("no free slot")
            slot = min(self._free)
            self._free.remove(slot)
            return slot

    def release(self, slot: int) -> None:
        with self._lock:
            assert slot not in self._free, f"slot {slot} freed twice"
            self._free.add(slot)


def weight_bytes(shape: GPT2Shape, weights: str, *, tied: bool) -> int:
    """Bytes that one model of `shape` takes in a slot, in one of `WEIGHT_FORMATS`."""
    sizes = shape.tensor_shapes()
    if tied:
        del sizes["lm_head.weight"]
    return sum(_tensor_bytes(name, size, weights) for name, size in sizes.items())


def _tensor_bytes(name: str, size: tuple[int, ...], weights: str) -> int:
    if weights != "int8":
        return math.prod(size) * _ITEM_BYTES[weights]
    if len(size) == 1 or name == "wpe.weight":  # added, never multiplied: not worth a loss
        return math.prod(size) * 4
    columns = size[0] if name in ("wte.weight", "lm_head.weight") else size[1]
    return math.prod(size) + columns * _COLUMN_BYTES


def kv_bytes_per_row(shape: GPT2Shape, weights: str) -> int:
    """Bytes of one sequence's keys and values at full context."""
    return 2 * shape.n_layer * shape.n_positions * shape.n_embd * _ITEM_BYTES.get(weights, 2)
