"""Who fetches a model on this node, and what a fetch that came to nothing has left for the next.

    <root>/<hash of the id>.lock                        held by who fetches the model, and says how far that is
    <root>/<hash of the id>/<commit>/                   the files, or parts of them, that a fetch left
    <root>/<hash of the id>/<commit>~<process>.<n>/     those of a fetch under way

The lock saves work and is needed for nothing else: a folder is taken over by one rename, so that no two processes
ever write one file, and one whose process has died may be taken over as well.
"""

from __future__ import annotations

import fcntl
import hashlib
import math
import os
import random
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from serve.store.staging import STALE_AFTER_S, is_orphaned, own_prefix

MAX_LEFT = 100  # folders: what more is left goes, the oldest first

_POLL_S = 0.05
_LOOK_EVERY_S = 60.0
_UNDER_WAY = "~"  # in no commit's name


class Claims:
    """The folder `root`. Methods block on disk; safe to use from many threads and processes."""

    def __init__(self, root: Path, *, is_locking: bool = True, clock: Callable[[], float] = time.time) -> None:
        self._root, self._is_locking, self._clock = root, is_locking, clock
        self._swept_at = -math.inf
        self._counted: tuple[float, int] | None = None  # when, and how many bytes

    @contextmanager
    def turn(
        self, key: str, check_time: Callable[[], object], on_wait: Callable[[str], None]
    ) -> Iterator[Callable[[str], None]]:
        """One at a time for each `key`. While others have their turn `check_time` is called: it may raise.

        Gives what tells those who wait something. `on_wait` is called with "" if there is anybody to wait for, and then
        with each new text that one tells.
        """
        if not self._is_locking:
            yield lambda text: None
            return
        path = self._folder(key).with_suffix(".lock")
        path.parent.mkdir(parents=True, exist_ok=True)
        lock, heard = _try_lock(path), ""
        if lock is None:
            on_wait("")
        while lock is None:
            if (told := _read(path)) not in ("", heard):
                heard = told
                on_wait(told)
            check_time()
            time.sleep(_POLL_S * random.uniform(0.5, 1.5))
            lock = _try_lock(path)
        try:
            yield lambda text: _write(path, text)
        finally:
            path.unlink(missing_ok=True)  # first: who has opened it meanwhile will see that it is another one
            os.close(lock)

    def begin(self, key: str, commit: str) -> Path:
        """A folder of the caller's own for the files of `commit`, with those that an earlier fetch left.

        What is left of the model's other commits is removed. `keep`, `drop` or a rename elsewhere ends it.
        """
        folder = self._folder(key)
        mine = self._new(folder, f"{commit}{_UNDER_WAY}{own_prefix()}")
        for left in self._left_in(folder):
            if _commit(left) != commit:
                self._remove(left)
                continue
            with suppress(OSError):  # another process was quicker, or `mine` has what a first one held
                os.rename(left, mine)
        os.utime(mine)  # it is a day from now that nobody wants it any more
        return mine

    def keep(self, mine: Path) -> None:
        """Leaves the files to the next fetch of the same commit."""
        try:
            os.rename(mine, mine.with_name(_commit(mine)))
            self._counted = None
        except OSError:  # another process has left its own
            self.drop(mine)

    def drop(self, mine: Path) -> None:
        """Removes the folder, and that of its model when nothing else is in it."""
        shutil.rmtree(mine, ignore_errors=True)
        with suppress(OSError):
            mine.parent.rmdir()

    def forget(self, key: str) -> None:
        """Removes what fetches have left of it. One under way ends by itself: its model was deleted."""
        for left in self._left_in(self._folder(key)):
            self._remove(left)

    def sweep(self, older_than_s: float = STALE_AFTER_S) -> None:
        """Removes what fetches have left that nobody has taken up since, and the oldest of more than MAX_LEFT.

        Does nothing when it was done within the minute. 0: all that nobody is working on, and now.
        """
        now = self._clock()
        if older_than_s and now - self._swept_at < _LOOK_EVERY_S:
            return
        self._swept_at, self._counted = now, None
        for number, (at, left) in enumerate(sorted(self._left(), reverse=True)):
            if number >= MAX_LEFT or max(0.0, now - at) >= older_than_s:
                self._remove(left)

    def num_bytes(self) -> int:
        """Of what nobody is working on, which `sweep(0)` would free; at most a minute old."""
        now = self._clock()
        if self._counted is None or now - self._counted[0] >= _LOOK_EVERY_S:
            self._counted = now, sum(_num_bytes(left) for _, left in self._left())
        return self._counted[1]

    def _left(self) -> Iterator[tuple[float, Path]]:
        """When it was left, and what, of all models."""
        with suppress(FileNotFoundError):
            for folder in [entry.path for entry in os.scandir(self._root) if entry.is_dir()]:
                for left in self._left_in(Path(folder)):
                    with suppress(FileNotFoundError):
                        yield left.stat().st_mtime, left

    def _left_in(self, folder: Path) -> list[Path]:
        """The folders nobody is working on; of another machine's process that is known after a day."""
        with suppress(FileNotFoundError):
            return [path for path in sorted(folder.iterdir()) if self._is_left(path)]
        return []

    def _is_left(self, path: Path) -> bool:
        _, is_under_way, owner = path.name.partition(_UNDER_WAY)
        if not is_under_way or is_orphaned(owner):
            return True
        with suppress(FileNotFoundError):
            return self._clock() - path.stat().st_mtime > STALE_AFTER_S
        return False

    def _remove(self, left: Path) -> None:
        """Takes it over first: what goes is nothing that another fetch goes on with at the same moment."""
        mine = left.with_name(f"{_commit(left)}{_UNDER_WAY}{own_prefix()}{uuid.uuid4().hex}")
        with suppress(OSError):
            os.rename(left, mine)
            self.drop(mine)

    def _new(self, folder: Path, prefix: str) -> Path:
        while True:
            folder.mkdir(parents=True, exist_ok=True)
            with suppress(FileNotFoundError):  # who was the last to leave it has just removed it
                return Path(tempfile.mkdtemp(prefix=prefix, dir=folder))

    def _folder(self, key: str) -> Path:
        return self._root / hashlib.sha256(key.lower().encode()).hexdigest()[:32]


def _try_lock(path: Path) -> int | None:
    """The descriptor that holds the lock; None while another one does, also one of this process's."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(descriptor), path.stat()):
            return descriptor
    except (BlockingIOError, FileNotFoundError):
        pass
    except BaseException:
        os.close(descriptor)
        raise
    os.close(descriptor)
    return None


def _write(path: Path, text: str) -> None:
    """Opens and closes it: where it lies in a network file system others can then read it."""
    with suppress(OSError):  # on a full disk nobody is told
        path.write_text(text, encoding="utf-8")


def _read(path: Path) -> str:
    """Empty also when it is gone, or is being written."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return ""


def _commit(folder: Path) -> str:
    return folder.name.partition(_UNDER_WAY)[0]


def _num_bytes(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        with suppress(FileNotFoundError):
            total += path.lstat().st_size if path.is_file() else 0
    return total
