"""Looks for a word in all that lies in folders: raw bytes in the usual encodings, and what archives hold."""

from __future__ import annotations

import gzip
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

_ENCODINGS = ("utf-8", "utf-16-le", "utf-16-be")


def find(word: str, *folders: Path) -> list[str]:
    """The files whose name or content has the ASCII `word`; what goes away meanwhile does not count."""
    needles = [word.encode(encoding) for encoding in _ENCODINGS]
    found = []
    for folder in folders:
        for path in sorted(folder.rglob("*")):
            with suppress(OSError):
                if word in path.name or (path.is_file() and any(_has(path, needle) for needle in needles)):
                    found.append(str(path))
    return found


def _has(path: Path, needle: bytes) -> bool:
    raw = path.read_bytes()
    return needle in raw or any(needle in content for content in _inside(path, raw))


def _inside(path: Path, raw: bytes) -> Iterator[bytes]:
    if raw[:2] == b"PK":
        with suppress(zipfile.BadZipFile), zipfile.ZipFile(path) as archive:
            for name in archive.namelist():
                yield name.encode()
                yield archive.read(name)
    if raw[:2] == b"\x1f\x8b":
        with suppress(OSError, EOFError, zlib.error):
            yield gzip.decompress(raw)
