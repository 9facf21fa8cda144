"""The cleaned texts a model has learnt, kept beside its revisions so that they can be made again.

    <home of the model>/.datasets/<sha256>.jsonl.gz     for the service's own user alone

They are private: no id names them, no listing shows them, and they go with the model. What the lines say is the
business of who keeps them.
"""

from __future__ import annotations

import gzip
import os
import re
import zlib
from collections.abc import Iterable
from pathlib import Path

from serve.errors import NotFound
from serve.store.disk import sync, translated

DATASETS = ".datasets"  # no revision can be called that: none begins with a dot
_SHA256 = re.compile(r"[0-9a-f]{64}")


def write_dataset(home: Path, sha256: str, lines: Iterable[str]) -> Path:
    """Writes `lines`, each without its end. Equal lines give equal bytes."""
    path = home / DATASETS / _file_name(sha256)
    path.parent.mkdir(mode=0o700, exist_ok=True)
    part = path.with_suffix(".part")
    with open(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
        with gzip.GzipFile(filename="", mode="wb", fileobj=file, mtime=0) as packed:
            packed.writelines(line.encode() + b"\n" for line in lines)
        file.flush()
        os.fsync(file.fileno())
    os.rename(part, path)
    sync(path.parent)
    return path


def find_dataset(home: Path, sha256: str) -> Path | None:
    """The file of one data set, if it is kept."""
    path = home / DATASETS / _file_name(sha256)
    return path if path.is_file() else None


def read_dataset(path: Path) -> list[str]:
    """The lines that were written. Raises: NotFound where they are damaged, StoreUnavailable."""
    with translated("read a data set"):
        try:
            with gzip.open(path, "rt", encoding="utf-8", newline="\n") as file:
                return [line.removesuffix("\n") for line in file]
        except (gzip.BadGzipFile, zlib.error, EOFError, UnicodeDecodeError) as exc:
            raise damaged() from exc


def damaged() -> NotFound:
    """What to raise where a data set does not hold what it should."""
    return NotFound("The data set that is kept with the model is damaged.")


def move_datasets(source: Path, home: Path) -> None:
    """Moves those of one folder into another; one that is there already is the same."""
    if not (source / DATASETS).is_dir():
        return
    (home / DATASETS).mkdir(mode=0o700, exist_ok=True)
    for path in sorted((source / DATASETS).iterdir()):
        os.rename(path, home / DATASETS / path.name)
    sync(home / DATASETS)
    (source / DATASETS).rmdir()


def _file_name(sha256: str) -> str:
    if not _SHA256.fullmatch(sha256):
        raise NotFound("A data set is named by its sha256: 64 hex digits.")
    return f"{sha256}.jsonl.gz"
