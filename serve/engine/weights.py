"""Weights of many models of one shape, in numbered slots that never move.

Two slabs with one interface. `HostSlab` keeps each slot's matrices apart and loops over the groups of a
step: on a CPU a step is bound by reading weights, and this reads each model's once. `DeviceSlab` keeps one
tensor ``[slots, in, out]`` per matrix and computes all groups by one `grouped_mm`. Loading a model is a copy
into a slot, evicting is freeing the slot. They know nothing of model ids, leases or budgets.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Protocol

import torch
import torch.nn.functional as F  # noqa: N812  (torch's own name for it)
from torch import Tensor

from serve.engine.batch import Groups
from serve.engine.memory import zeros
from serve.shape import GPT2Shape

BLOCK_MATRICES = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
VOCAB_MULTIPLE = 64  # of the device slab's head: grouped_mm wants aligned rows, and tensor cores like it


class Slab(Protocol):
    """Places for the weights of `num_slots` models, all with their head tied to the embedding or none.

    `write` and `clear` may run beside a step on other slots.
    """

    shape: GPT2Shape
    num_slots: int
    dtype: torch.dtype
    device: torch.device
    tied: bool

    def acquire(self) -> int:
        """A free slot number. Raises: IndexError when there is none (the caller budgets)."""
        ...

    def write(self, slot: int, tensors: Mapping[str, Tensor]) -> None:
        """Copy a model's tensors (canonical names, transformers' layout) into `slot`."""
        ...

    def clear(self, slot: int) -> None:
        """Free `slot`. Nobody may be using it."""
        ...

    def embed(self, token_ids: Tensor, positions: Tensor, groups: Groups) -> Tensor:
        """Token plus position embedding: (R,), (R,) -> (R, D)."""
        ...

    def layer_norm(self, name: str, x: Tensor, groups: Groups) -> Tensor:
        """(R, D) -> (R, D) with each row's own scale and shift."""
        ...

    def linear(self, name: str, x: Tensor, groups: Groups) -> Tensor:
        """(R, in) -> (R, out): each row by its own model's matrix and bias `name`."""
        ...

    def head(self, x: Tensor, groups: Groups) -> Tensor:
        """(R, D) -> (R, V) logits."""
        ...


class _Slots:
    """Free slot numbers, lowest first, so that a half-empty slab stays dense."""

    def __init__(self, num_slots: int) -> None:
        self._free = set(range(num_slots))
        self._lock = threading.Lock()

    def acquire(self) -> int:
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


class _Vectors:
    """Layer-norm vectors and biases of all slots, stacked: ``name -> (num_slots, width)``."""

    def __init__(self, shape: GPT2Shape, num_slots: int, dtype: torch.dtype, device: torch.device) -> None:
        self._stacks = {
            name: zeros((num_slots, *size), dtype, device)
            for name, size in shape.tensor_shapes().items()
            if len(size) == 1
        }

    def write(self, slot: int, tensors: Mapping[str, Tensor]) -> None:
        for name, stack in self._stacks.items():
            stack[slot].copy_(tensors[name])

    def one(self, name: str, slot: int) -> Tensor:
        """(width,)"""
        return self._stacks[name][slot]

    def rows(self, name: str, groups: Groups) -> Tensor:
        """(R, width): the vector of each row's slot."""
        return self._stacks[name].index_select(0, groups.row_slots)

    def layer_norm(self, name: str, x: Tensor, groups: Groups, epsilon: float) -> Tensor:
        width = (x.shape[-1],)
        if len(groups.slots) == 1:
            slot = groups.slots[0]
            weight, bias = self.one(f"{name}.weight", slot), self.one(f"{name}.bias", slot)
            return F.layer_norm(x, width, weight, bias, epsilon)
        normal = F.layer_norm(x, width, eps=epsilon)
        return torch.addcmul(self.rows(f"{name}.bias", groups), normal, self.rows(f"{name}.weight", groups))


class HostSlab:
    """Slots in ordinary memory. A matrix is kept as ``[out, in]``, which `F.linear` reads fastest."""

    def __init__(self, shape: GPT2Shape, num_slots: int, dtype: torch.dtype, *, tied: bool = True) -> None:
        self.shape, self.num_slots, self.dtype, self.tied = shape, num_slots, dtype, tied
        self.device = torch.device("cpu")
        self._slots = _Slots(num_slots)
        self._vectors = _Vectors(shape, num_slots, dtype, self.device)
        self._matrices: list[dict[str, Tensor]] = [{} for _ in range(num_slots)]

    def acquire(self) -> int:
        return self._slots.acquire()

    def write(self, slot: int, tensors: Mapping[str, Tensor]) -> None:
        self._vectors.write(slot, tensors)
        self._matrices[slot] = self._copy_matrices(tensors)

    def _copy_matrices(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        sources = {"wte": tensors["wte.weight"], "wpe": tensors["wpe.weight"]}
        if not self.tied:
            sources["lm_head"] = tensors["lm_head.weight"]
        for layer in range(self.shape.n_layer):
            for name in BLOCK_MATRICES:
                # Conv1D keeps [in, out]; transposed here once rather than at each step.
                sources[f"h.{layer}.{name}"] = tensors[f"h.{layer}.{name}.weight"].t()
        # One map for all of them, so that freeing the slot gives its memory back to the system.
        places = zeros((sum(source.numel() for source in sources.values()),), self.dtype, self.device)
        matrices, start = {}, 0
        for name, source in sources.items():
            matrices[name] = places[start : start + source.numel()].view(source.shape).copy_(source)
            start += source.numel()
        matrices.setdefault("lm_head", matrices["wte"])
        return matrices

    def clear(self, slot: int) -> None:
        self._matrices[slot] = {}
        self._slots.release(slot)

    def embed(self, token_ids: Tensor, positions: Tensor, groups: Groups) -> Tensor:
        parts = [
            F.embedding(token_ids[start:end], m["wte"]) + F.embedding(positions[start:end], m["wpe"])
            for m, start, end in self._grouped(groups)
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def layer_norm(self, name: str, x: Tensor, groups: Groups) -> Tensor:
        return self._vectors.layer_norm(name, x, groups, self.shape.layer_norm_epsilon)

    def linear(self, name: str, x: Tensor, groups: Groups) -> Tensor:
        parts = [
            F.linear(x[start:end], m[name], self._vectors.one(f"{name}.bias", slot))
            for slot, (m, start, end) in zip(groups.slots, self._grouped(groups), strict=True)
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def head(self, x: Tensor, groups: Groups) -> Tensor:
        parts = [F.linear(x[start:end], m["lm_head"]) for m, start, end in self._grouped(groups)]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _grouped(self, groups: Groups) -> list[tuple[dict[str, Tensor], int, int]]:
        bounds = groups.bounds
        return [(self._matrices[slot], bounds[i], bounds[i + 1]) for i, slot in enumerate(groups.slots)]


class DeviceSlab:
    """Slots as one tensor ``[slots, in, out]`` per matrix; all groups of a step in one `grouped_mm`.

    Everything is allocated once. The vocabulary is padded to a multiple of 64; padding never leaves `head`.
    """

    def __init__(
        self, shape: GPT2Shape, num_slots: int, dtype: torch.dtype, device: torch.device, *, tied: bool = True
    ) -> None:
        self.shape, self.num_slots, self.dtype, self.device, self.tied = shape, num_slots, dtype, device, tied
        self._slots = _Slots(num_slots)
        self._vectors = _Vectors(shape, num_slots, dtype, device)
        vocab = -(-shape.vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE
        sizes = shape.tensor_shapes()

        def stack(*size: int) -> Tensor:
            return zeros((num_slots, *size), dtype, device)

        self._wte = stack(vocab, shape.n_embd)
        self._wpe = stack(shape.n_positions, shape.n_embd)
        self._lm_head = self._wte if tied else stack(vocab, shape.n_embd)
        self._blocks = {
            f"h.{layer}.{name}": stack(*sizes[f"h.{layer}.{name}.weight"])
            for layer in range(shape.n_layer)
            for name in BLOCK_MATRICES
        }

    def acquire(self) -> int:
        return self._slots.acquire()

    def write(self, slot: int, tensors: Mapping[str, Tensor]) -> None:
        self._vectors.write(slot, tensors)
        vocab = self.shape.vocab_size
        self._wte[slot, :vocab].copy_(tensors["wte.weight"])
        self._wpe[slot].copy_(tensors["wpe.weight"])
        if not self.tied:
            self._lm_head[slot, :vocab].copy_(tensors["lm_head.weight"])
        for name, stack in self._blocks.items():
            stack[slot].copy_(tensors[f"{name}.weight"])

    def clear(self, slot: int) -> None:
        self._slots.release(slot)

    def embed(self, token_ids: Tensor, positions: Tensor, groups: Groups) -> Tensor:
        return self._wte[groups.row_slots, token_ids] + self._wpe[groups.row_slots, positions]

    def layer_norm(self, name: str, x: Tensor, groups: Groups) -> Tensor:
        return self._vectors.layer_norm(name, x, groups, self.shape.layer_norm_epsilon)

    def linear(self, name: str, x: Tensor, groups: Groups) -> Tensor:
        return self._grouped_mm(x, self._blocks[name], groups) + self._vectors.rows(f"{name}.bias", groups)

    def head(self, x: Tensor, groups: Groups) -> Tensor:
        return self._grouped_mm(x, self._lm_head.transpose(1, 2), groups)[:, : self.shape.vocab_size]

    def _grouped_mm(self, x: Tensor, stack: Tensor, groups: Groups) -> Tensor:
        return F.grouped_mm(x, stack, offs=groups.ends)


def build_slab(shape: GPT2Shape, num_slots: int, dtype: torch.dtype, device: torch.device, *, tied: bool) -> Slab:
    """The slab that suits `device`."""
    if device.type == "cpu":
        return HostSlab(shape, num_slots, dtype, tied=tied)
    return DeviceSlab(shape, num_slots, dtype, device, tied=tied)


def weight_bytes(shape: GPT2Shape, dtype: torch.dtype, *, tied: bool) -> int:
    """Bytes that one model of `shape` takes in a slot."""
    parameters = shape.num_parameters + (0 if tied else shape.vocab_size * shape.n_embd)
    return parameters * dtype.itemsize
