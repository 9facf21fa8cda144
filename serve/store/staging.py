"""Folders in which things are made or removed, seen by nobody else: they end with the process that asked for them."""

from __future__ import annotations

import os
import shutil
import socket
import tempfile
import time
from pathlib import Path

from serve.store.disk import make_folder

STALE_AFTER_S = 24 * 3600


class Staging:
    """The folders `<root>/<owner>.<random>/`, on the same file system as what they become."""

    def __init__(self, root: Path) -> None:
        self._root = root
        make_folder(root)
        self.sweep()

    def new(self) -> Path:
        """An empty folder of this process's own."""
        return Path(tempfile.mkdtemp(prefix=own_prefix(), dir=self._root))

    def holds(self, folder: Path) -> bool:
        """Whether `folder` comes from `new`."""
        return folder.resolve().parent == self._root

    def discard(self, folder: Path) -> None:
        """Removes a folder and what is in it."""
        shutil.rmtree(folder, ignore_errors=True)

    def remove(self, path: Path) -> None:
        """Takes a file or folder from its place in one step; the bytes go when nobody can find them any more."""
        trash = self.new()
        try:
            os.rename(path, trash / path.name)
        finally:
            self.discard(trash)

    def sweep(self) -> None:
        """Removes what processes that no longer live have left behind."""
        now = time.time()
        for folder in self._root.iterdir():
            try:
                if is_orphaned(folder.name) or now - folder.stat().st_mtime > STALE_AFTER_S:
                    shutil.rmtree(folder, ignore_errors=True)
            except FileNotFoundError:
                continue  # its owner, or another sweeper, was quicker


def own_prefix() -> str:
    """How the names of this process's own folders begin."""
    return f"{_owner(os.getpid())}."


def is_orphaned(name: str) -> bool:
    """Whether the process of this machine whose own a folder of this name was no longer lives."""
    host, _, rest = name.partition(":")
    pid = rest.split(".")[0]
    return host == socket.gethostname() and pid.isdigit() and not name.startswith(f"{_owner(int(pid))}.")


def _owner(pid: int) -> str:
    """`host:pid.start`: a process, even when its number is used again (a restarted container's always is)."""
    try:
        # Field 22, counted after the name in brackets, which may hold spaces. Source: proc(5).
        start = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        start = "unknown"
    return f"{socket.gethostname()}:{pid}.{start}"
