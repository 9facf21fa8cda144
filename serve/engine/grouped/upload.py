"""Copies from the host into a device's memory, beside what runs there."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

PIECE_BYTES = 16 << 20  # large enough for a bus at full speed, small enough that packing and copying overlap


class Uploader:
    """Fills stretches of `size` elements through pinned memory, on streams of its own, from any thread.

    Buffers and streams are kept: as many as there ever were uploads at once.
    """

    def __init__(self, size: int, dtype: torch.dtype, device: torch.device) -> None:
        self._size, self._dtype, self._device = size, dtype, device
        self._idle: list[tuple[Tensor, torch.cuda.Stream | None]] = []
        self._lock = threading.Lock()

    def upload(self, target: Tensor, parts: Iterable[tuple[int, Tensor]]) -> None:
        """Put each part at its offset of `target`; offsets ascend. Returns when all of it is there.

        What lies between parts is set to 0, or to what an earlier upload had there.
        """
        with self._lane() as buffer:
            sent = end = 0
            for start, part in parts:
                end = start + part.numel()
                buffer[start:end].view(part.shape).copy_(part)
                if (end - sent) * self._dtype.itemsize >= PIECE_BYTES:
                    target[sent:end].copy_(buffer[sent:end], non_blocking=True)
                    sent = end
            target[sent:end].copy_(buffer[sent:end], non_blocking=True)

    @contextmanager
    def _lane(self) -> Iterator[Tensor]:
        """A buffer to copy from, within a stream whose copies are over in the end.

        The stream waits for no other: what runs meanwhile uses other slots.
        """
        with self._lock:
            buffer, stream = self._idle.pop() if self._idle else self._make()
        try:
            with torch.cuda.stream(stream):
                yield buffer
        finally:  # even after a failure: the next upload may overwrite the buffer
            if stream is not None:
                # One that sleeps: a thread that spins would slow the engine's.
                done = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
                done.record(stream)
                done.synchronize()
            with self._lock:
                self._idle.append((buffer, stream))

    def _make(self) -> tuple[Tensor, torch.cuda.Stream | None]:
        on_cuda = self._device.type == "cuda"
        buffer = torch.zeros(self._size, dtype=self._dtype, pin_memory=on_cuda)
        # NOTE: torch hands out 32 streams in turn. Made once, they stay apart from the one that graphs are captured on.
        return buffer, torch.cuda.Stream(self._device) if on_cuda else None  # type: ignore[no-untyped-call]
