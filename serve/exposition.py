"""What all processes of a node have counted, as one text; any of them can tell it.

Each process writes its values into mapped files of its own, in one folder of the node (prometheus-client's multiprocess
mode); whoever is asked reads them all. Counters and histograms of processes that have ended are added up in two files,
so that nothing is counted twice, nothing is lost, and the folder does not grow; gauges end with their process, however
it ends. Exemplars do not exist in this mode. It takes Linux, which says which processes live; elsewhere each one tells
what it has counted itself.

Why not Ray's exporter: it wants an interface of its own for each metric, lags by some 8 s, labels each series with a
worker's id, which changes with every restart, and sends 575 KiB a scrape. It can be scraped beside this one, as can
HAProxy's. Why not each replica by itself: their ports come and go with them, and a gateway behind the one port of the
service answers for a different process each time, so that its counters would jump.

It knows nothing of what is counted, nor of Ray.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import struct
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry, disable_created_metrics, values
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import Metric
from prometheus_client.mmap_dict import MmapedDict, mmap_key
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.registry import Collector

from serve.logs import get_logger
from serve.metrics import Metrics

log = get_logger()

FOLDER_VARIABLE = "PROMETHEUS_MULTIPROC_DIR"  # prometheus-client's own name; children inherit it

_ENDED = "ended"  # in the place of a process: what those had counted that are gone
_ABSORBED = "absorbed"  # in its files: whose values are in them, for whoever dies before it has removed theirs
_LOCK = "lock"
# Laid out at once: a page that is first written when the disk is full would kill the process (SIGBUS). 80 routes and
# all other series take less than half a megabyte of histograms.
_SIZES = {
    "counter": 1 << 18,
    "histogram": 1 << 20,
    "gauge_livesum": 1 << 16,
    "gauge_livemax": 1 << 16,
    "gauge_livemostrecent": 1 << 16,
}
_ADDED_UP = ("counter", "histogram")
_ENTRY_BYTES = 32  # beside its key, at most: its length, padding, value and time
_FRESH_S = 1.0
_DAMAGED = (RuntimeError, ValueError, struct.error)  # what reading such a file raises

_MmapedDict: Any = MmapedDict  # none of these has types
_merge_files: Any = MultiProcessCollector.merge
_MultiProcessValue: Any = values.MultiProcessValue
_disable_created_metrics: Any = disable_created_metrics


def render(metrics: Metrics, accept: str = "") -> tuple[bytes, str]:
    """The exposition in the form that the header `Accept` asks for (Prometheus' or OpenMetrics), and its content type.

    Blocks: it reads the files of all processes, of ten in some 50 ms of one core; but no more often than once a second.
    """
    encode, content_type = choose_encoder(accept)
    return encode(metrics.registry), content_type


def share(folder: Path) -> bool:
    """From here on this process counts in files under `folder`; False where there is no room for them, or no Linux.

    To be called before the process makes its one `Metrics`. Creates the folder, for its owner alone.
    """
    files = {folder / f"{kind}_{_identity()}.db": num_bytes for kind, num_bytes in _SIZES.items()}
    try:
        if not _is_alive(_identity()):
            raise OSError(errno.ENOSYS, "there is no /proc to tell which processes live")
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder.chmod(0o700)  # refused where it is somebody else's
        for path, num_bytes in files.items():
            _lay_out(path, num_bytes)
    except OSError as exc:
        log.warning("metrics_not_shared", folder=str(folder), reason=exc.strerror or type(exc).__name__)
        _count_alone(files)
        return False
    os.environ[FOLDER_VARIABLE] = str(folder)
    values.ValueClass = _MultiProcessValue(_identity)
    return True


def _count_alone(files: Iterable[Path]) -> None:
    """Whatever the process that started this one does: in files that are not laid out, a count may end it (SIGBUS)."""
    os.environ.pop(FOLDER_VARIABLE, None)
    values.ValueClass = values.MutexValue
    for path in files:
        with suppress(OSError):
            path.unlink()


def open_metrics(folder: Path | None, *, enabled: bool = True) -> Metrics:
    """The metrics of this process, whose `registry` tells those of all processes that share `folder`, if it does."""
    if not enabled:
        return Metrics(enabled=False)
    _disable_created_metrics()  # a series for each series that says since when: which processes that share cannot
    if folder is None or not share(folder):
        return Metrics()
    metrics = Metrics()
    metrics.registry = CollectorRegistry()
    metrics.registry.register(Node(folder))
    return metrics


def join_parent(*, enabled: bool = True) -> Metrics:
    """The metrics of a child: it counts where the process does that started it, if that shares what it counts."""
    folder = os.environ.get(FOLDER_VARIABLE)
    return open_metrics(Path(folder) if folder else None, enabled=enabled and folder is not None)


# --- The processes of a node ------------------------------------------------------------------------------------


class Node(Collector):
    """What all processes that share `folder` have counted; it looks at most once a second, however many ask."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._one_at_a_time = threading.Lock()
        self._told: list[Metric] = []
        self._is_fresh_until = 0.0

    def collect(self) -> Iterable[Metric]:
        """Raises: OSError when a file cannot be read now: numbers that leave it out would seem to have fallen."""
        with self._one_at_a_time:
            if time.monotonic() >= self._is_fresh_until:
                self._told = self._collect()
                self._is_fresh_until = time.monotonic() + _FRESH_S
            return self._told

    def _collect(self) -> list[Metric]:
        if self._files()[1]:
            self._absorb()
        with self._locked(fcntl.LOCK_SH):
            living, dead = self._files()
            found = living
            for kind in _ADDED_UP:
                ended, absorbed = self._ended(kind)
                found += ended + [path for path in _of(kind, dead) if path.name not in absorbed]
            return _merge(found)

    def _absorb(self) -> None:
        """Adds what processes counted that are gone to what those before them did, and removes their files.

        A process may die in the middle of it: what the file of the ended says of whom it holds is as whole as the file.
        """
        with suppress(OSError), self._locked(fcntl.LOCK_EX | fcntl.LOCK_NB):  # another one is at it; or no room
            _, dead = self._files()
            for kind in _ADDED_UP:
                if found := _of(kind, dead):
                    self._absorb_kind(kind, found)
            for path in dead:
                path.unlink(missing_ok=True)

    def _absorb_kind(self, kind: str, dead: list[Path]) -> None:
        """Raises: OSError."""
        before, absorbed = self._ended(kind)
        entries = {
            mmap_key(metric.name, sample.name, list(sample.labels), list(sample.labels.values()), metric.documentation):
                sample.value
            for metric in _merge(before + [path for path in dead if path.name not in absorbed], accumulate=False)
            for sample in metric.samples
        }  # fmt: skip
        entries |= {mmap_key(_ABSORBED, _ABSORBED, ["file"], [path.name], ""): 0.0 for path in dead}
        fresh = self._folder / f"{kind}_{_ENDED}.new"
        fresh.unlink(missing_ok=True)
        _lay_out(fresh, 4096 + sum(len(key) + _ENTRY_BYTES for key in entries))
        file = _MmapedDict(str(fresh))
        for key, value in entries.items():
            file.write_value(key, value, 0.0)
        file.close()
        fresh.replace(self._folder / f"{kind}_{_ENDED}.db")

    def _files(self) -> tuple[list[Path], list[Path]]:
        """Those of processes that live, and of those that are gone."""
        is_alive = cache(_is_alive)
        living: list[Path] = []
        dead: list[Path] = []
        for path in sorted(self._folder.glob("*_*.db")):
            if (process := path.stem.rpartition("_")[2]) != _ENDED:
                (living if is_alive(process) else dead).append(path)
        return living, dead

    def _ended(self, kind: str) -> tuple[list[Path], set[str]]:
        """The file of those that are gone, if there is one that can be read, and whose files are added up in it."""
        path = self._folder / f"{kind}_{_ENDED}.db"
        try:
            return [path], {labels["file"] for name, labels in _read(path) if name == _ABSORBED}
        except (FileNotFoundError, *_DAMAGED):
            return [], set()

    @contextmanager
    def _locked(self, how: int) -> Iterator[None]:
        """Raises: OSError when it is to be had at once and is not."""
        with open(self._folder / _LOCK, "ab") as file:
            fcntl.flock(file, how)
            yield


def _of(kind: str, paths: list[Path]) -> list[Path]:
    return [path for path in paths if path.name.startswith(f"{kind}_")]


def _merge(paths: list[Path], *, accumulate: bool = True) -> list[Metric]:
    """Without the files that are damaged. Raises: OSError."""
    try:
        merged: Iterable[Metric] = _merge_files(map(str, paths), accumulate)
    except _DAMAGED:
        merged = _merge_files([str(path) for path in paths if _is_whole(path)], accumulate)
    return [metric for metric in merged if metric.name != _ABSORBED]


def _is_whole(path: Path) -> bool:
    """Not so while its process has just made it; nor where a disk has damaged it, which must not hide the others."""
    try:
        for _ in _read(path):
            pass
    except _DAMAGED:
        return False
    return True


def _read(path: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """Name and labels of each value. Raises: OSError; those of _DAMAGED."""
    for key, *_ in _MmapedDict.read_all_values_from_file(str(path)):
        _, name, labels, _ = json.loads(key)
        yield name, labels


def _lay_out(path: Path, num_bytes: int) -> None:
    """Raises: OSError when the disk has no room for it."""
    number = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        os.posix_fallocate(number, 0, num_bytes)
    except OSError:
        path.unlink()
        raise
    finally:
        os.close(number)


# --- Who a process is -------------------------------------------------------------------------------------------


def _identity() -> str:
    return _identity_of(os.getpid())  # asked at every count: a fork must not write into its parent's files


@cache
def _identity_of(pid: int) -> str:
    """The number alone comes again, in a container soon."""
    return f"{pid}-{_started(pid)}"


def _is_alive(identity: str) -> bool:
    pid, _, started = identity.partition("-")
    now = _started(int(pid)) if pid.isdecimal() else None
    return now is not None and started in (now, "")


def _started(pid: int) -> str | None:
    """When, in ticks of the system since its start; None where there is no such process. Source: proc(5), field 22."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if state in "ZX" else fields[18]
