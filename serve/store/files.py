"""The files of a revision as a Hub serves them: their names, sizes and digests.

A name is looked for among those that are there and never joined to a path. It does not know HTTP, or which model a
folder belongs to.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias

from serve.errors import NotFound
from serve.types import RepoFile

_CHUNK_BYTES = 1 << 20
_MAX_REMEMBERED = 65_536  # digests: of some 5,000 models; 20 MB
_MAX_DEPTH = 4

# What the Hub keeps by Git LFS; all else is text to it.
_LARGE_SUFFIXES = frozenset(
    {".safetensors", ".png", ".jpg", ".jpeg", ".gif", ".webp", ".onnx", ".gguf", ".msgpack", ".parquet", ".zip", ".gz"}
)
_LARGE_BYTES = 10 << 20

# Formats whose reader may run what is in them: nobody gets these from here.
_UNSAFE = frozenset({".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib", ".npy", ".npz", ".h5"})

Digests: TypeAlias = tuple[str, str]
"""A file's sha256 and git's blob id of it, as in RepoFile."""

_Key: TypeAlias = tuple[str, int, int, int]


def list_files(folder: Path, *, with_digests: bool) -> tuple[RepoFile, ...]:
    """By name. Links, names that begin with a dot, and other revisions below are no part of a revision.

    Raises: FileNotFoundError when the folder goes away meanwhile.
    """
    found = sorted(_walk(folder, ""), key=lambda file: file.name)
    return tuple(map(_REMEMBERED.fill, found)) if with_digests else tuple(found)


def find_file(folder: Path, name: str) -> RepoFile:
    """With its digests. Raises: NotFound; FileNotFoundError when the folder goes away meanwhile."""
    for file in _walk(folder, ""):
        if file.name == name:
            return _REMEMBERED.fill(file)
    raise NotFound("The model has no such file.")


def _walk(folder: Path, prefix: str, depth: int = 1) -> Iterator[RepoFile]:
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith(".") or entry.is_symlink() or not entry.name.isprintable():
                continue
            path = folder / entry.name
            if entry.is_dir(follow_symlinks=False):
                if depth < _MAX_DEPTH and not (path / "config.json").is_file():  # of a home: a revision
                    yield from _walk(path, f"{prefix}{entry.name}/", depth + 1)
            elif entry.is_file(follow_symlinks=False) and path.suffix.lower() not in _UNSAFE:
                yield RepoFile(prefix + entry.name, entry.stat(follow_symlinks=False).st_size, path)


class DigestCache:
    """Reads a file once however many ask, and again only when its size, time or inode is another."""

    def __init__(self, digest: Callable[[RepoFile, int], Digests], max_entries: int = _MAX_REMEMBERED) -> None:
        self._digest, self._max_entries = digest, max_entries
        self._known: OrderedDict[_Key, Future[Digests]] = OrderedDict()
        self._lock = threading.Lock()

    def fill(self, file: RepoFile) -> RepoFile:
        """The file with its digests, and the size that it has now. Raises: FileNotFoundError."""
        descriptor = file.open()
        try:
            status = os.fstat(descriptor)
            file = replace(file, num_bytes=status.st_size)
            key = (str(file.location), status.st_size, status.st_mtime_ns, status.st_ino)
            with self._lock:
                future = self._known.get(key)
                is_mine = future is None
                if future is None:
                    future = self._known[key] = Future()
                self._known.move_to_end(key)
                while len(self._known) > self._max_entries:
                    self._known.popitem(last=False)
            if is_mine:
                self._compute(key, future, file, descriptor)
            sha256, blob_id = future.result()
            return replace(file, sha256=sha256, blob_id=blob_id)
        finally:
            os.close(descriptor)

    def _compute(self, key: _Key, future: Future[Digests], file: RepoFile, descriptor: int) -> None:
        try:
            digests = self._digest(file, descriptor)
        except BaseException as exc:
            self._forget(key)
            future.set_exception(exc)
            return
        status = os.fstat(descriptor)
        if (status.st_size, status.st_mtime_ns) != key[1:3]:
            self._forget(key)  # somebody writes to it at this moment
        future.set_result(digests)

    def _forget(self, key: _Key) -> None:
        with self._lock:
            self._known.pop(key, None)


def _read_digests(file: RepoFile, descriptor: int) -> Digests:
    if file.location.suffix.lower() not in _LARGE_SUFFIXES and file.num_bytes <= _LARGE_BYTES:
        return "", _digest(_blob(file.num_bytes), descriptor)
    sha256 = _digest(hashlib.sha256(), descriptor)  # all that is read of it: sha1 too would take as long again
    pointer = replace(file, sha256=sha256).lfs_pointer
    blob = _blob(len(pointer))
    blob.update(pointer)
    return sha256, blob.hexdigest()


def _blob(num_bytes: int) -> Any:
    """What git's id of a file is made by, from its content."""
    return hashlib.sha1(b"blob %d\0" % num_bytes, usedforsecurity=False)


def _digest(digest: Any, descriptor: int) -> str:
    offset = 0
    while chunk := os.pread(descriptor, _CHUNK_BYTES, offset):
        digest.update(chunk)
        offset += len(chunk)
    return str(digest.hexdigest())


_REMEMBERED = DigestCache(_read_digests)
