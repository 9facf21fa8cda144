"""Repositories: folders as commits, branches and tags that name them, and the digests that the Hub gives files."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_LARGE = (".bin", ".safetensors", ".png", ".webp")


@dataclass(frozen=True)
class Commit:
    """The files of one folder. `info`: what the Hub's answer about it says beyond, or instead of, the usual."""

    sha: str
    folder: Path
    info: dict[str, Any]

    def files(self) -> Iterator[Path]:
        return (path for path in sorted(self.folder.rglob("*")) if path.is_file())

    def name_of(self, file: Path) -> str:
        return file.relative_to(self.folder).as_posix()

    @classmethod
    def of(cls, folder: Path, info: dict[str, Any]) -> Commit:
        """Its sha is that of the files' names and contents: the same folder is the same commit."""
        commit = cls("", folder, info)
        total = hashlib.sha1(usedforsecurity=False)
        for file in commit.files():
            total.update(commit.name_of(file).encode() + file.read_bytes())
        return cls(total.hexdigest(), folder, info)


@dataclass
class Repo:
    """`commits`: oldest first."""

    id: str
    commits: list[Commit] = field(default_factory=list)
    branches: dict[str, str] = field(default_factory=dict)  # name -> sha
    tags: dict[str, str] = field(default_factory=dict)

    def find(self, revision: str) -> Commit | None:
        sha = self.branches.get(revision) or self.tags.get(revision) or revision
        return next((commit for commit in reversed(self.commits) if commit.sha == sha), None)

    @property
    def head(self) -> Commit:
        return self.find("main") or self.commits[-1]


def is_large(file: Path) -> bool:
    """Whether the Hub keeps it outside git (LFS)."""
    return file.name.endswith(_LARGE)


def sha256(file: Path) -> str:
    return _digests(file, *_state(file))[0]


def blob_id(file: Path) -> str:
    """Git's id of the content."""
    return _digests(file, *_state(file))[1]


def etag(file: Path) -> str:
    """The sha256 of LFS files, git's id of the others."""
    return sha256(file) if is_large(file) else blob_id(file)


def _state(file: Path) -> tuple[int, int, int]:
    stat = file.stat()
    return stat.st_mtime_ns, stat.st_size, stat.st_ino


@functools.lru_cache(maxsize=4096)
def _digests(file: Path, mtime_ns: int, size: int, inode: int) -> tuple[str, str]:
    content = file.read_bytes()
    git = hashlib.sha1(f"blob {len(content)}\0".encode() + content, usedforsecurity=False)
    return hashlib.sha256(content).hexdigest(), git.hexdigest()
