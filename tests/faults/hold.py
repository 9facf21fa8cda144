"""One thread of another process held still, as a device that does not answer would hold it: the others go on.

Linux only; by ptrace, so as root, or for one's own children.
"""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager

import psutil  # type: ignore[import-untyped]

_SEIZE, _INTERRUPT, _DETACH = 0x4206, 0x4207, 17  # Source: linux/ptrace.h
_ANY_THREAD = 0x4000_0000  # __WALL
_libc = ctypes.CDLL(None, use_errno=True)
_libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
_libc.ptrace.restype = ctypes.c_long


def busiest_thread(pid: int, for_s: float = 2.0) -> int:
    """The thread of the process that has computed most in so many seconds from now: of a generator, the engine's."""
    process = psutil.Process(pid)
    before = {one.id: one.user_time + one.system_time for one in process.threads()}
    time.sleep(for_s)
    after = {one.id: one.user_time + one.system_time for one in process.threads()}
    busiest: int = max(after, key=lambda thread: after[thread] - before.get(thread, 0.0))
    return busiest


@contextmanager
def held(thread: int) -> Iterator[None]:
    """Stops the thread until the block ends, or its process does."""
    _ptrace(_SEIZE, thread)
    _ptrace(_INTERRUPT, thread)
    try:
        yield
    finally:
        if _libc.ptrace(_DETACH, thread, None, None) < 0:  # it has been killed: else a zombie would be left
            os.waitpid(thread, _ANY_THREAD)


def _ptrace(request: int, thread: int) -> None:
    if _libc.ptrace(request, thread, None, None) < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
