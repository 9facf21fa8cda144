"""Which service runs over a data folder: a small file there says so while it does.

A service that was killed leaves the file behind. It is then known by its process, which is gone, or is another one
under the same number, started at another time.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil  # type: ignore[import-untyped]

from serve.errors import disk_error

FILE = "run.json"
_SAME_START_S = 2.0  # the system's clock may have been set since
_POLL_S = 0.1


@dataclass(frozen=True, slots=True)
class Running:
    """A service: its first process, when that started, where it answers. Times are seconds since 1970."""

    pid: int
    created: float
    url: str
    started_at: float


def find(data: Path) -> Running | None:
    """The service over `data` that starts or runs now."""
    try:
        found = Running(**json.loads((data / FILE).read_text()))
        created = float(psutil.Process(found.pid).create_time())
    except (OSError, ValueError, TypeError, psutil.Error):
        return None
    is_it = abs(created - found.created) < _SAME_START_S and not _is_gone(psutil.Process(found.pid))
    return found if is_it else None


@contextmanager
def announced(data: Path, url: str) -> Iterator[None]:
    """While the block runs, `find` gives this process. Creates the folder. Raises: StoreUnavailable."""
    data = data.absolute()
    own = Running(os.getpid(), psutil.Process().create_time(), url, time.time())
    path, fresh = data / FILE, data / f"{FILE}.{own.pid}"
    try:
        data.mkdir(parents=True, exist_ok=True)
        fresh.write_text(json.dumps(asdict(own)))
        fresh.replace(path)
    except OSError as exc:
        raise disk_error(f"write to the data folder {data}", exc) from exc
    try:
        yield
    finally:
        if find(data) == own:
            with suppress(OSError):
                path.unlink()


def stop(running: Running, timeout_s: float) -> list[str]:
    """Asks the service to end and waits; the processes of it that are left then. Raises: psutil.AccessDenied."""
    try:
        first = psutil.Process(running.pid)
        family = [first, *first.children(recursive=True)]
        first.terminate()
    except psutil.NoSuchProcess:
        return []
    deadline = time.monotonic() + timeout_s
    while (left := [one for one in family if not _is_gone(one)]) and time.monotonic() < deadline:
        time.sleep(_POLL_S)
    return [title for one in left if (title := _title(one))]


def _is_gone(process: psutil.Process) -> bool:
    """Also when nobody has asked yet how it ended."""
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def _title(process: psutil.Process) -> str:
    with suppress(psutil.Error):
        return f"{process.pid} {process.name()}"
    return ""
