"""How fast this machine reads memory: the floor under every decode step."""

from __future__ import annotations

import mmap
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from serve.engine.native.library import is_supported, read_seconds

REPEATS = 3


CHUNK_BYTES = 8 << 20
"""Read by all threads together before they go on to the next. Halves of a GiB, one a thread, came at half the rate
(40 against 80 GB/s, two cores of an EPYC of family 26, November 2026, in alternate runs)."""


class Bandwidth:
    """How fast a block of huge pages, as the engine's slots are, is read once by torch's number of threads.

    `sample` between other measurements: neighbours take their part, now more, now less. Each sample is the best of
    several ways.
    """

    def __init__(self, num_bytes: int = 1 << 30) -> None:
        self._samples: list[float] = []
        self._memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._memory.madvise(mmap.MADV_HUGEPAGE)
        self._data = torch.frombuffer(self._memory, dtype=torch.float32).fill_(1)
        self._ways: list[Callable[[Tensor], float]] = [_torch_seconds]
        if is_supported("float32"):
            self._ways += [read_seconds, _chunked_seconds]

    def sample(self) -> float:
        """Bytes a second, now."""
        best_s = min(way(self._data) for way in self._ways for _ in range(REPEATS))
        self._samples.append(self._data.nbytes / best_s)
        return self._samples[-1]

    @property
    def best(self) -> float:
        """Bytes a second: the highest of all samples."""
        return max(self._samples)

    @property
    def median(self) -> float:
        """Bytes a second. Far below `best` where the machine was not quiet."""
        return statistics.median(self._samples)


def _torch_seconds(data: Tensor) -> float:
    started = time.perf_counter()
    data.sum()
    return time.perf_counter() - started


def _chunked_seconds(data: Tensor) -> float:
    count = CHUNK_BYTES // data.itemsize
    return sum(read_seconds(data[start : start + count]) for start in range(0, len(data), count))
