"""Which service runs over a data folder: a small file there says so while it does. And who has a port.

A service that was killed leaves the file behind. It is then known by its process, which is gone, or is another one
under the same number, started at another time.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil  # type: ignore[import-untyped]

from serve.errors import Conflict, RookeryError
from serve.settings import Settings

FILE = "run.json"
# The other files of a service in its data folder.
EVENTS = "log.jsonl"  # what all its processes log
OUTPUT = "rookery.log"  # what it says on its terminal, where it has none
_SAME_START_S = 2.0  # the system's clock may have been set since
_POLL_S = 0.1


@dataclass(frozen=True, slots=True)
class Running:
    """A service: its first process, when that started, where it answers. Times are seconds since 1970."""

    pid: int
    created: float
    url: str
    started_at: float


class BadFolder(RookeryError):
    """What was named as the data folder cannot be one."""

    code = "bad_data_folder"


class RunsAlready(Conflict):
    """Another service over the same folder was quicker."""


def find(data: Path) -> Running | None:
    """The service over `data` that starts or runs now."""
    try:
        found = Running(**json.loads((data / FILE).read_text()))
        created = float(psutil.Process(found.pid).create_time())
    except (OSError, ValueError, TypeError, psutil.Error):
        return None
    is_it = abs(created - found.created) < _SAME_START_S and not _is_gone(psutil.Process(found.pid))
    return found if is_it else None


def default_url() -> str:
    """Of the service over the data folder that the environment names, or else the one where `up` starts it."""
    found = find(Path(os.environ.get("ROOKERY_DATA") or Settings().data))  # a wrong setting is for others to tell
    return found.url if found else Settings().url


@contextmanager
def announced(data: Path, url: str) -> Iterator[None]:
    """While the block runs, `find` gives this process. Creates the folder. Raises: BadFolder, RunsAlready."""
    data = data.absolute()
    own = Running(os.getpid(), psutil.Process().create_time(), url, time.time())
    path, fresh = data / FILE, data / f"{FILE}.{own.pid}"
    with in_folder(data), _one_at_a_time(data):
        if (other := find(data)) is not None:
            raise RunsAlready(f"A Rookery (process {other.pid}) is over {data} already, at {other.url}.")
        with open(fresh, "w", opener=for_owner) as file:
            json.dump(asdict(own), file)
        fresh.replace(path)
    try:
        yield
    finally:
        if find(data) == own:
            with suppress(OSError):
                path.unlink()


@contextmanager
def in_folder(data: Path) -> Iterator[None]:
    """Creates the data folder, for its owner alone; the block writes into it. Raises: BadFolder."""
    try:
        data.mkdir(mode=0o700, parents=True, exist_ok=True)
        yield
    except OSError as exc:
        reason = exc.strerror or type(exc).__name__
        raise BadFolder(
            f"The data folder {data} cannot be written ({reason}); name another one with --data or ROOKERY_DATA."
        ) from exc


def for_owner(path: str, flags: int) -> int:
    """An `opener`: a new file is for its owner alone."""
    return os.open(path, flags, 0o600)


@contextmanager
def _one_at_a_time(folder: Path) -> Iterator[None]:
    number = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # some network file systems lock no folder
            fcntl.flock(number, fcntl.LOCK_EX)
        yield
    finally:
        os.close(number)


def holder(port: int) -> str:
    """Who listens at a port of this machine, such as "process 1, python"; "" where one may not see it."""
    try:
        for one in psutil.net_connections("tcp"):
            if one.laddr and one.laddr.port == port and one.status == psutil.CONN_LISTEN and one.pid:
                return f"process {one.pid}, {psutil.Process(one.pid).name()}"
    except psutil.Error:
        pass
    return ""


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
