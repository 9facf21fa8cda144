"""Folders for what pushes have fetched, each for one process at a time and for its user alone."""

from __future__ import annotations

import fcntl
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_KEPT_S = 7 * 86_400.0  # since a push last asked for it


@contextmanager
def claimed(cache: Path, key: str, on_wait: Callable[[], None]) -> Iterator[Path]:
    """The folder of `key`, removed when the block ends well. What nobody has asked for in a week goes first."""
    cache.mkdir(parents=True, exist_ok=True)
    cache.chmod(0o700)
    folder = cache / key
    with _locked(folder, on_wait):
        os.utime(folder)
        _sweep(cache)
        yield folder
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _locked(folder: Path, on_wait: Callable[[], None]) -> Iterator[None]:
    """Who waited for one that was removed meanwhile gets a new one."""
    while True:
        folder.mkdir(mode=0o700, exist_ok=True)
        handle = os.open(folder, os.O_RDONLY)
        try:
            if not _try_lock(handle):
                on_wait()
                fcntl.flock(handle, fcntl.LOCK_EX)
            if _is_still(folder, handle):
                yield
                return
        finally:
            os.close(handle)


def _sweep(cache: Path) -> None:
    for folder in cache.iterdir():
        with suppress(OSError):  # another push is quicker
            if folder.stat().st_mtime > time.time() - _KEPT_S:
                continue
            handle = os.open(folder, os.O_RDONLY)
            try:
                if _try_lock(handle):
                    shutil.rmtree(folder)
            finally:
                os.close(handle)


def _try_lock(handle: int) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_still(folder: Path, handle: int) -> bool:
    try:
        return os.path.samestat(folder.stat(), os.fstat(handle))
    except FileNotFoundError:
        return False
