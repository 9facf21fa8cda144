"""Processes that do not outlive those who started them."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal

import psutil  # type: ignore[import-untyped]

_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36  # Source: linux/prctl.h


def tie_to_parent(parent: int, number: signal.Signals = signal.SIGKILL) -> None:
    """From now on this process gets the signal when `parent`, which started it, ends."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, number, 0, 0, 0)
    if os.getppid() != parent:  # it had ended before
        os._exit(1)


def adopt_orphans() -> None:
    """Descendants whose parents end become this process's children, so that `end_descendants` finds them."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def end_descendants() -> None:
    """Kills all that was started from here, directly or not: libraries start servers of their own."""
    while left := psutil.Process().children(recursive=True):
        for process in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(left)
