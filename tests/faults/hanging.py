"""Files whose disk stops to answer: reads of them wait, as on a file server that is gone, until they are let go on.

Each is a file system of one file (FUSE, by the kernel's own protocol), mounted over the file, which is there again
afterwards. Linux only, as root.
"""

from __future__ import annotations

import ctypes
import errno
import os
import stat
import struct
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

_libc = ctypes.CDLL(None, use_errno=True)
_READ_ONLY, _DETACH = 1, 2  # MS_RDONLY, MNT_DETACH

# Source: linux/fuse.h, protocol 7.31.
_FORGET, _GETATTR, _OPEN, _READ, _RELEASE, _FLUSH, _INIT, _INTERRUPT, _MANY_FORGET = 2, 3, 14, 15, 18, 25, 26, 36, 42
_UNANSWERED = (_FORGET, _INTERRUPT, _MANY_FORGET)
_HEAD = struct.Struct("<IIQQIIII")  # length, opcode, unique, node, user, group, process, padding
_ANSWER = struct.Struct("<IiQ")  # length, error, unique
_READ_ASKED = struct.Struct("<QQI")  # handle, offset, size
_STATE = struct.Struct("<QII6Q10I")  # how long it is valid; of the file: numbers, times, mode, ...
_BEGINNING = struct.Struct("<IIIIHHIIHHI7I")
_LONGEST = (1 << 20) + (1 << 16)  # of a request


class _HangingFile:
    """Serves `content`; reads that reach beyond `first` bytes wait for `let_go`."""

    def __init__(self, path: Path, first: int) -> None:
        self._path, self._content, self._first = path, path.read_bytes(), first
        self._device = os.open("/dev/fuse", os.O_RDWR)
        options = f"fd={self._device},rootmode=100444,user_id=0,group_id=0,allow_other".encode()
        if _libc.mount(b"hanging", os.fsencode(path), b"fuse", _READ_ONLY, options):
            raise OSError(ctypes.get_errno(), "cannot mount", str(path))
        self._lock = threading.Lock()
        self._waiting: list[Callable[[], None]] | None = []  # None: nobody waits any more
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def let_go(self) -> None:
        with self._lock:
            waiting, self._waiting = self._waiting or [], None
        for answer in waiting:
            answer()

    def close(self) -> None:
        self.let_go()
        if _libc.umount2(os.fsencode(self._path), _DETACH):
            raise OSError(ctypes.get_errno(), "cannot unmount", str(self._path))
        self._thread.join(30)  # it ends when nobody has the file open any more
        os.close(self._device)

    def _serve(self) -> None:
        while True:
            try:
                request = os.read(self._device, _LONGEST)
            except OSError:  # ENODEV: it is unmounted
                return
            _, opcode, unique, *_ = _HEAD.unpack_from(request)
            if opcode not in _UNANSWERED:
                self._answer(opcode, unique, request[_HEAD.size :])

    def _answer(self, opcode: int, unique: int, body: bytes) -> None:
        if opcode == _READ:
            _, offset, size = _READ_ASKED.unpack_from(body)
            part = self._content[offset : offset + size]
            self._when_read(offset + len(part), lambda: self._say(unique, part))
        elif opcode == _INIT:
            self._say(unique, _BEGINNING.pack(7, 31, 1 << 17, 0, 12, 9, 1 << 17, 1, 32, 0, 0, *[0] * 7))
        elif opcode == _GETATTR:
            size, mode = len(self._content), stat.S_IFREG | 0o444
            self._say(
                unique, _STATE.pack(60, 0, 0, 1, size, -(-size // 512), 0, 0, 0, 0, 0, 0, mode, 1, 0, 0, 0, 4096, 0)
            )
        elif opcode == _OPEN:
            self._say(unique, struct.pack("<QII", 0, 0, 0))
        elif opcode in (_FLUSH, _RELEASE):
            self._say(unique, b"")
        else:
            self._say(unique, b"", -errno.ENOSYS)

    def _when_read(self, end: int, answer: Callable[[], None]) -> None:
        with self._lock:
            if self._waiting is not None and end > self._first:
                self._waiting.append(answer)
                return
        answer()

    def _say(self, unique: int, body: bytes, error: int = 0) -> None:
        with suppress(FileNotFoundError):  # who asked has been killed
            os.write(self._device, _ANSWER.pack(_ANSWER.size + len(body), error, unique) + body)


@contextmanager
def hanging(files: Mapping[Path, int]) -> Iterator[None]:
    """File -> how many bytes can be read of it; whoever reads on waits until the block ends."""
    with ExitStack() as stack:
        for path, first in files.items():
            stack.callback(_HangingFile(path, first).close)
        yield
