"""A backend of torch operations: one grouped matrix product for all models of a step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from serve.engine.backend import Span
from serve.engine.grouped.batch import Batch, StepSize, prompts_of
from serve.engine.grouped.decode import DecodeSteps
from serve.engine.grouped.gpt2 import GPT2, is_aligned
from serve.engine.grouped.kv_cache import KVCache
from serve.engine.grouped.weights import Slab
from serve.shape import GPT2Shape


class GroupedBackend:
    """`Backend` for one device, in float32 or bfloat16."""

    def __init__(
        self,
        shape: GPT2Shape,
        num_slots: int,
        kv_rows: int,
        dtype: torch.dtype,
        device: torch.device,
        *,
        tied: bool = True,
    ) -> None:
        self.num_slots = num_slots
        self._device, self._n_positions = device, shape.n_positions
        self._slab = Slab(shape, num_slots, dtype, device, tied=tied)
        self._cache = KVCache(shape, kv_rows, dtype, device)
        self._gpt2 = GPT2(shape, self._slab, self._cache, tied=tied)
        captures = can_capture(shape, dtype, device)
        self._decode = DecodeSteps(self._gpt2.forward, num_slots, device, captures=captures)

    @property
    def num_graphs(self) -> int:
        """Sizes of decode steps that have been captured so far."""
        return self._decode.num_graphs

    def acquire(self) -> int:
        return self._slab.acquire()

    def write(self, slot: int, tensors: Mapping[str, Tensor]) -> None:
        self._slab.write(slot, tensors)

    def clear(self, slot: int) -> None:
        self._slab.clear(slot)

    def forward(self, spans: Sequence[Span]) -> Tensor:
        if any(len(span.token_ids) > 1 for span in spans):
            return self._forward_mixed(spans)
        size = StepSize.padded(spans, self._cache.num_rows, self._n_positions)
        logits = self._decode.run(size, spans)
        wanted = [row for row, span in enumerate(spans) if span.wants_logits or span.wants_all_logits]
        return logits[: len(spans)] if len(wanted) == len(spans) else logits[wanted]

    def _forward_mixed(self, spans: Sequence[Span]) -> Tensor:
        on_cuda = self._device.type == "cuda"
        size = StepSize.of(spans, self._n_positions)
        staged = Batch.empty(size, self.num_slots, torch.device("cpu"), pinned=on_cuda)
        staged.fill(spans)
        prompts = prompts_of(spans, self._n_positions, self._device)
        return self._gpt2.forward(staged.to(self._device), prompts)

    def forget(self, kv_row: int, length: int) -> None:
        self._cache.clear(kv_row, length)


def can_capture(shape: GPT2Shape, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether `grouped_mm` is one kernel there; elsewhere it reads the group ends back, which no graph can."""
    return (
        device.type == "cuda"
        and dtype == torch.bfloat16
        and torch.cuda.get_device_capability(device) >= (9, 0)
        and is_aligned(shape.n_embd, dtype)
        and is_aligned(shape.n_inner, dtype)
    )
