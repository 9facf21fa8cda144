"""What the store asks of the disk: one writer at a time, bytes that are really there, and errors in our words."""

from __future__ import annotations

import fcntl
import json
import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from serve.errors import disk_error

_held = threading.local()  # `paths`: the locks of each thread


@contextmanager
def translated(action: str) -> Iterator[None]:
    """What the disk refuses becomes StoreUnavailable or DiskFull: "Cannot `action`: ..."."""
    try:
        yield
    except OSError as exc:
        raise disk_error(action, exc) from exc


@contextmanager
def locked(path: Path, *, wait: bool = True) -> Iterator[None]:
    """One writer at a time, of all threads and processes. Who holds it may take it again.

    Raises: BlockingIOError where another holds it and `wait` is not set.
    """
    held: set[Path] = _held.__dict__.setdefault("paths", set())
    if path in held:
        yield
        return
    with path.open("a") as file:
        fcntl.flock(
            file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB
        )  # closing the file ends it, so a dead process holds nothing
        held.add(path)
        try:
            yield
        finally:
            held.remove(path)


def sync(path: Path) -> None:
    """Has a file's bytes, or a folder's names, on the disk itself."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """For people to read as well, in a folder that need not be there yet."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_in_order(path: Path) -> None:
    """Has the system forget its copy of a file that is on the disk, and read it again from the start.

    A file that was written piece by piece lies in memory page by page; read in order it lies in large pieces, which
    cost a load of 250 MB 4 ms to map rather than 22.
    """
    if not hasattr(os, "posix_fadvise"):
        return
    with suppress(OSError), path.open("rb", buffering=0) as file:  # it is only for speed
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        while file.read(8 << 20):
            pass
