"""Decode steps that are launched as one: on a CUDA device, a graph captured once for each size of step.

A graph repeats the same kernels on the same addresses. Slot numbers, group ends, positions and lengths are
inputs, and slots never move, so neither new sequences nor new weights need another capture.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from serve.engine.backend import Span
from serve.engine.grouped.batch import Batch, StepSize

Compute = Callable[[Batch], Tensor]


class DecodeSteps:
    """Runs steps of one-token spans, by size. Where `captures` is false the same function runs on the same buffers."""

    def __init__(self, compute: Compute, num_slots: int, device: torch.device, *, captures: bool) -> None:
        self._compute, self._num_slots, self._device = compute, num_slots, device
        self._inputs: dict[StepSize, Batch] = {}
        self._graphs: dict[StepSize, tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        self._captures = captures
        # NOTE: graphs share their memory, so the logits of one are lost when another runs.
        self._pool = torch.cuda.graph_pool_handle() if captures else None
        self._stream = torch.cuda.Stream(device) if captures else None  # type: ignore[no-untyped-call]

    @property
    def num_graphs(self) -> int:
        return len(self._graphs)

    def run(self, size: StepSize, spans: Sequence[Span]) -> Tensor:
        """``(R, V)`` logits of all rows, padding included; they are the caller's until the next call."""
        inputs = self._inputs.get(size)
        if inputs is None:
            inputs = self._inputs[size] = Batch.empty(size, self._num_slots, self._device)
        # A new one each time, which costs nothing once it is warm: torch keeps it until the copy has been made.
        staged = Batch.empty(size, self._num_slots, torch.device("cpu"), pinned=self._device.type == "cuda")
        staged.fill(spans)
        inputs.buffer.copy_(staged.buffer, non_blocking=True)
        if not self._captures:
            return self._compute(inputs)
        if size not in self._graphs:
            self._graphs[size] = self._capture(inputs)
        graph, logits = self._graphs[size]
        graph.replay()
        return logits

    def _capture(self, inputs: Batch) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        # 1. Once outside of a capture: libraries set themselves up. It stores the keys that the replay stores again.
        self._compute(inputs)
        # 2. "thread_local": other threads copy weights meanwhile, which is no business of the graph.
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            logits = self._compute(inputs)
        return graph, logits
