"""Weights of many models of one shape, in numbered slots that never move.

A slot is one row of ``(num_slots, slot size)``, so that loading a model is one stretch of memory to fill, and each
matrix of all models is a view ``[slots, in, out]`` into it, so that one `grouped_mm` computes all groups of a
step. Everything is allocated once. It knows nothing of model ids, leases or budgets.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from serve.engine.backend import Slots
from serve.engine.grouped.upload import Uploader
from serve.engine.memory import give_back, zeros
from serve.shape import GPT2Shape

VOCAB_MULTIPLE = 64  # of the head: grouped_mm wants aligned rows, and tensor cores like it
ALIGNMENT = 128  # bytes; of every tensor in a slot: a cache line of a device, and more than grouped_mm asks for
PAGE = 4096  # bytes; of a slot, so that on a CPU a freed one gives all of its memory back


class Slab:
    """The slots. `write` and `clear` may run beside a step on other slots."""

    def __init__(
        self, shape: GPT2Shape, num_slots: int, dtype: torch.dtype, device: torch.device, *, tied: bool
    ) -> None:
        self.device = device
        self._slots = Slots(num_slots)
        self._places, size = _places(shape, dtype, tied=tied)
        self._memory = zeros((num_slots, size), dtype, device)
        self._uploader: Uploader | None = None
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # uploads wait for nothing, so the zeros must be there before the first
            self._uploader = Uploader(size, dtype, device)
        vectors = [place for name, place in self._places.items() if len(place[1]) == 1]
        self._vectors = slice(vectors[0][0], vectors[-1][0] + vectors[-1][1][0])

    def acquire(self) -> int:
        """Raises: IndexError when all are taken."""
        return self._slots.acquire()

    def write(self, slot: int, tensors: Mapping[str, Tensor]) -> None:
        """Copy a model's tensors (canonical names, transformers' layout) into `slot`; returns when they are there."""
        parts = ((start, tensors[name]) for name, (start, _) in self._places.items())
        if self._uploader is not None:
            self._uploader.upload(self._memory[slot], parts)
            return
        for start, part in parts:
            self._memory[slot, start : start + part.numel()].view(part.shape).copy_(part)

    def clear(self, slot: int) -> None:
        """Free `slot`. Nobody may be using it."""
        give_back(self._memory[slot])
        self._slots.release(slot)

    def stack(self, name: str) -> Tensor:
        """``(num_slots, ...)``: the tensor `name` of all slots; a vocabulary's is padded with zeros."""
        start, size = self._places[name]
        return self._memory[:, start : start + math.prod(size)].view(-1, *size)

    def vectors(self, row_slots: Tensor) -> dict[str, Tensor]:
        """Layer-norm vectors and biases of each row's own model, ``name -> (R, width)``, by one gather for all."""
        rows = self._memory[:, self._vectors].index_select(0, row_slots)
        first = self._vectors.start
        return {
            name: rows[:, start - first : start - first + size[0]]
            for name, (start, size) in self._places.items()
            if len(size) == 1
        }


def slot_bytes(shape: GPT2Shape, dtype: torch.dtype, *, tied: bool) -> int:
    """Bytes of one slot, padding included."""
    return _places(shape, dtype, tied=tied)[1] * dtype.itemsize


def _places(shape: GPT2Shape, dtype: torch.dtype, *, tied: bool) -> tuple[dict[str, tuple[int, tuple[int, ...]]], int]:
    """Where each tensor lies in a slot, vectors first: name -> (start, size), and the slot's size, in elements."""
    sizes = shape.tensor_shapes()
    if tied:
        del sizes["lm_head.weight"]
    places: dict[str, tuple[int, tuple[int, ...]]] = {}
    end = 0
    for name, size in sorted(sizes.items(), key=lambda item: len(item[1])):
        if name in ("wte.weight", "lm_head.weight"):
            size = (_round_up(size[0], VOCAB_MULTIPLE), size[1])
        places[name] = (end, size)
        end = _round_up(end + math.prod(size), ALIGNMENT // dtype.itemsize)
    return places, _round_up(end, PAGE // dtype.itemsize)


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
