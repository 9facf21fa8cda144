"""Copies of weights on a disk of this machine's own: what lies in a shared folder is read over the network once.

    <root>/<namespace>/<name>/<revision>/model.safetensors         as under the folder of models
    <root>/<namespace>/<name>/<revision>/model.safetensors.part    being made, by who holds its lock

Nothing of them is missed when it is lost. A copy counts only while its original is there, and has its size; it is made
once however many processes of the machine want it. When it was last used is its access time, set here. It knows no
model and no engine: a file that may yet change is not copied.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import shutil
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, NamedTuple

from serve.errors import DiskFull
from serve.logs import get_logger, ms
from serve.store.budget import IN_USE_S, RESERVE_BYTES
from serve.store.homes import NO_NAMESPACE, Homes
from serve.store.integrity import is_intact
from serve.store.validate import WEIGHTS
from serve.types import ModelId

log = get_logger()

WAIT_S = 60.0  # for another process that makes the copy: a file that is read over the network is better than none

_POLL_S = 0.05
_CHUNK_BYTES = 8 << 20
_PART = ".part"


class LocalCopies:
    """Copies in `root` of weights below `models`, of at most `limit_bytes` in all (0: while the disk has room).

    The least recently used go first, none that was used within `in_use_s`. Methods block on disk; safe to use from many
    threads and processes. What goes wrong is logged: then there is no copy.
    """

    def __init__(
        self,
        root: Path,
        models: Path,
        limit_bytes: int = 0,
        *,
        in_use_s: float = IN_USE_S,
        free_bytes: Callable[[Path], int] = lambda path: shutil.disk_usage(path).free,
        clock: Callable[[], float] = time.time,
        on_evict: Callable[[], None] = lambda: None,
    ) -> None:
        self._root, self._models, self._limit_bytes = root, models, limit_bytes
        self._homes = Homes(root)
        self._in_use_s, self._free_bytes, self._clock, self._on_evict = in_use_s, free_bytes, clock, on_evict

    def find(self, weights: Path) -> Path | None:
        """The copy of `weights`, which is used now. Raises: OSError where `weights` cannot be looked at."""
        original = weights.stat()
        copy = self._copy_of(weights)
        with suppress(OSError):
            if copy is not None and _is_sealed(original) and copy.stat().st_size == original.st_size:
                os.utime(copy, ns=(int(self._clock() * 1e9), original.st_mtime_ns))
                return copy
        return None

    def make(self, weights: Path) -> Path | None:
        """As `find`, with the copy made if there is none; None where there can be none."""
        copy = self._copy_of(weights)
        if copy is None or not _is_sealed(weights.stat()):
            return None
        try:
            copy.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            with _claimed(copy.with_name(copy.name + _PART)) as part:
                return self.find(weights) or self._fill(part, weights, copy)
        except (OSError, DiskFull, _Differs) as exc:
            log.warning("weights_not_copied", path=str(copy.relative_to(self._root)), reason=_reason(exc))
            return None

    def forget(self, model_id: str) -> None:
        """Removes the copies of a model, in any case, and stops those that are being made."""
        wanted = model_id.lower()
        try:
            for spelled in self._homes.ids(wanted.rpartition("/")[0] or NO_NAMESPACE):
                if spelled.lower() == wanted:
                    for path in _files(self._homes.of(ModelId.parse(spelled))):
                        self._remove(path)
        except OSError as exc:  # the disk does not answer: `sweep` will ask again
            log.warning("copies_not_forgotten", model=model_id, reason=_reason(exc))

    def sweep(self) -> None:
        """Removes the copies of what is gone, and what processes that have died were making."""
        for path in _files(self._root):
            with suppress(OSError):  # the shared folder does not answer: nothing is known
                if self._is_gone(path) if path.name == WEIGHTS else _is_abandoned(path):
                    self._remove(path)

    def _copy_of(self, weights: Path) -> Path | None:
        """Where it is or would be; None for what is no revision in the shared folder, but was put there by hand."""
        if not weights.is_relative_to(self._models):
            return None
        relative = weights.relative_to(self._models)
        return self._root / relative if len(relative.parts) == 4 and relative.parts[0][0] != "." else None

    def _is_gone(self, copy: Path) -> bool:
        """Whether its original is. Raises: OSError when that cannot be told."""
        try:
            return not stat.S_ISREG((self._models / copy.relative_to(self._root)).stat().st_mode)
        except (FileNotFoundError, NotADirectoryError):
            return self._models.is_dir()  # else the shared folder is not mounted, and not one of them is gone

    def _remove(self, path: Path) -> None:
        with suppress(OSError):  # another was quicker, or other copies are in the folder
            path.unlink(missing_ok=True)
            for folder in path.relative_to(self._root).parents[:-1]:
                (self._root / folder).rmdir()

    # --- Making one -------------------------------------------------------------------------------------------

    def _fill(self, part: IO[bytes], weights: Path, copy: Path) -> Path:
        """Raises: OSError, DiskFull, _Differs."""
        started, num_bytes = time.monotonic(), weights.stat().st_size
        self._make_room(num_bytes)
        digest = _copy(weights, part)
        if os.fstat(part.fileno()).st_size != num_bytes or is_intact(weights.parent, {WEIGHTS: digest}) is False:
            raise _Differs
        os.fchmod(part.fileno(), 0o444)
        os.fsync(part.fileno())  # a machine that goes down must not leave zeros of the right size
        if not _is_still(Path(part.name), part):
            raise FileNotFoundError(errno.ENOENT, "The model was deleted meanwhile.")
        os.rename(part.name, copy)
        log.info(
            "weights_copied",
            path=str(copy.relative_to(self._root)),
            bytes=num_bytes,
            duration_ms=ms(time.monotonic() - started),
        )
        return self.find(weights) or copy

    def _make_room(self, num_bytes: int) -> None:
        """Raises: DiskFull, before anything is removed, when removing all that may be would not do."""
        kept = sorted(self._kept())
        over = num_bytes + RESERVE_BYTES - self._free_bytes(self._root)
        if self._limit_bytes:
            over = max(over, sum(one.num_bytes for one in kept) + num_bytes - self._limit_bytes)
        idle = [one for one in kept if one.used_at < self._clock() - self._in_use_s and one.path.name == WEIGHTS]
        if over > sum(one.num_bytes for one in idle):
            raise DiskFull("Copies of weights that are in use take all the room.", retry_after_s=60)
        for one in idle:
            if over <= 0:
                break
            self._remove(one.path)
            over -= one.num_bytes
            self._on_evict()
            log.info("copy_evicted", path=str(one.path.relative_to(self._root)), bytes=one.num_bytes)

    def _kept(self) -> Iterator[_Kept]:
        for path in _files(self._root):
            with suppress(FileNotFoundError):  # removed since
                status = path.stat()
                yield _Kept(status.st_atime, status.st_size, path)


class _Kept(NamedTuple):
    used_at: float
    num_bytes: int
    path: Path


class _Differs(Exception):
    """What was copied is not what was published."""


def _reason(exc: Exception) -> str:
    if isinstance(exc, OSError):
        return exc.strerror or type(exc).__name__
    return exc.message if isinstance(exc, DiskFull) else str(exc.__doc__)


def _is_sealed(status: os.stat_result) -> bool:
    """Whether it is a published file, which never changes."""
    return not status.st_mode & 0o222


def _files(folder: Path) -> list[Path]:
    """All copies below it, also those being made. What another process removes meanwhile may be among them or not."""
    found = (Path(parent, name) for parent, _, names in os.walk(folder) for name in names)
    return [path for path in found if path.name in (WEIGHTS, WEIGHTS + _PART)]


def _copy(source: Path, target: IO[bytes]) -> str:
    """The sha256 of what was copied, in hex. The system does not keep what it has read for it in memory."""
    digest, buffer = hashlib.sha256(), memoryview(bytearray(_CHUNK_BYTES))
    with source.open("rb", buffering=0) as file:
        while num_bytes := file.readinto(buffer):
            digest.update(buffer[:num_bytes])
            target.write(buffer[:num_bytes])
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    target.flush()
    return digest.hexdigest()


# --- One at a time ------------------------------------------------------------------------------------------


@contextmanager
def _claimed(part: Path) -> Iterator[IO[bytes]]:
    """The empty file `part`, for one process at a time. It is gone at the end. Raises: BlockingIOError after WAIT_S."""
    deadline = time.monotonic() + WAIT_S
    while True:
        with part.open("ab") as file:
            if _try_lock(file, deadline) and _is_still(part, file):
                file.truncate(0)  # of a process that has died
                try:
                    yield file
                finally:
                    if _is_still(part, file):
                        part.unlink(missing_ok=True)
                return


def _try_lock(file: IO[bytes], deadline: float) -> bool:
    """False when it is not to be had now. Raises: BlockingIOError, after the deadline."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        if time.monotonic() > deadline:
            raise
        time.sleep(_POLL_S)
        return False
    return True


def _is_still(path: Path, file: IO[bytes]) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _is_abandoned(part: Path) -> bool:
    """Raises: FileNotFoundError when it has just gone."""
    with part.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True
