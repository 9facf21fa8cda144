"""Memory that costs nothing until it is written, and is given back when it is freed; and how one sees that it is short.

`torch.zeros` on a CPU writes every page, and what `malloc` gave in small pieces it seldom returns to the system.
Anonymous maps do neither: 2.4 GB of cache adds 1 MB to the process, and freeing a slot frees its pages.
"""

from __future__ import annotations

import ctypes
import errno
import math
import mmap
from collections.abc import Sequence

import torch
from torch import Tensor

_libc = ctypes.CDLL(None, use_errno=True)


def zeros(size: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """As `torch.zeros`, untouched on a CPU; the map lives as long as any tensor that looks into it."""
    count = math.prod(size)
    if device.type != "cpu" or count == 0:
        return torch.zeros(*size, dtype=dtype, device=device)
    pages = mmap.mmap(-1, count * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(pages, dtype=dtype, count=count).view(*size)


def give_back(tensor: Tensor) -> None:
    """Return the whole pages of a contiguous part of `zeros` to the system; they read as 0 afterwards.

    On a device this does nothing, and the values stay.
    """
    if tensor.device.type != "cpu":
        return
    first = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    end = (tensor.data_ptr() + tensor.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
    if end > first and _libc.madvise(ctypes.c_void_p(first), ctypes.c_size_t(end - first), mmap.MADV_DONTNEED):
        raise OSError(ctypes.get_errno(), "madvise failed")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether it tells of memory that was not given. torch's allocator for CPUs has no kind of its own for that."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    if type(error) is RuntimeError:
        return "DefaultCPUAllocator" in str(error) or "not enough memory" in str(error)
    return isinstance(error, MemoryError | torch.OutOfMemoryError)


def drop_caches(device: torch.device) -> None:
    """Gives back what the device's allocator keeps for later."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
