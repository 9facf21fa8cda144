"""What the store asks of the disk: one writer at a time, bytes that are really there, and errors in our words."""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

from serve.errors import disk_error

_held = threading.local()  # `paths`: the locks of each thread
# As /proc/self/mountinfo names them. By FUSE come file systems of other machines, and of this one: NTFS, mergerfs.
_SHARED = {"9p", "beegfs", "ceph", "cifs", "gfs2", "gpfs", "lustre", "nfs", "nfs4", "ocfs2", "smb3", "virtiofs"}
_BY_FUSE = {"ceph-fuse", "curvefs", "gcsfuse", "glusterfs", "juicefs", "mfs", "rclone", "s3fs", "seaweedfs", "sshfs"}


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


@lru_cache(maxsize=64)
def is_shared(device: int) -> bool:
    """Whether other machines may write to the file system `device`, a `st_dev`. Where nothing tells, they do not.

    A file that another machine removes is gone at once also for who has mapped it: to touch a page of it that is not in
    memory ends the process (SIGBUS).
    """
    with suppress(OSError):
        wanted = f"{os.major(device)}:{os.minor(device)}"
        for line in Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.split()[2] == wanted:
                kind = line.partition(" - ")[2].split()[0]
                return kind in _SHARED or kind.removeprefix("fuse.") in _BY_FUSE
    return False


def refresh(*folders: Path) -> None:
    """Has their names as they are now, also where another machine has just changed them.

    A network file system may show for seconds what was there before; to open a folder makes it look again.
    """
    for folder in folders:
        with suppress(OSError):  # it is not there
            os.close(os.open(folder, os.O_RDONLY))


def sync(path: Path) -> None:
    """Has a file's bytes, or a folder's names, on the disk itself."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace_file(path: Path, content: bytes) -> None:
    """All of it or what was there before, whatever happens; on the disk itself when it returns. Raises: OSError.

    A process that is killed in it leaves a file that ends in `.part`, for who owns the folder to sweep.
    """
    part = path.with_name(f"{path.name}.{secrets.token_hex(4)}.part")  # others may write the same file now
    try:
        part.write_bytes(content)
        sync(part)
        os.replace(part, path)
    except OSError:
        part.unlink(missing_ok=True)
        raise
    sync(path.parent)


def make_folder(folder: Path) -> None:
    """There is such a folder, and its name is on the disk: what is synced in it is not lost with the way to it."""
    missing = [one for one in folder.parents if not one.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for one in (folder, *missing):
        sync(one.parent)


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


def forget_cached(path: Path) -> None:
    """Has who reads the file next read the disk itself, not the system's copy of it."""
    if hasattr(os, "posix_fadvise"):
        with path.open("rb", buffering=0) as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
