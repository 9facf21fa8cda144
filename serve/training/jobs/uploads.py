"""The bytes of uploaded files, in a folder of the service's own; the rows that name them are in the database."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path

from sqlalchemy.orm import Session

from serve.database.connection import read_clock_ms
from serve.database.tables import FileRow
from serve.errors import RookeryError, disk_error
from serve.store.disk import make_folder, sync
from serve.types import FileRecord

ROWLESS_AFTER_S = 600  # of bytes: their row comes at once, or their gateway has died; erasing finds no such bytes


@contextlib.contextmanager
def take_over(staged: Sequence[FileRecord], folder: Path) -> Iterator[Callable[[Session], list[FileRow]]]:
    """Moves the bytes of `staged` into `folder`, each to its id; to be used around a transaction.

    What is given adds their rows to it. Where it was not called, or nothing could be committed, the bytes go again.
    Raises: StoreUnavailable.
    """
    is_named = False

    def add_rows(session: Session) -> list[FileRow]:
        nonlocal is_named
        now = read_clock_ms(session) // 1000
        rows = [
            FileRow(
                id=file.id,
                filename=file.filename,
                num_bytes=file.num_bytes,
                created_at=now,
                purpose=file.purpose,
                owner=file.owner,
            )
            for file in staged
        ]
        session.add_all(rows)
        is_named = True
        return rows

    try:
        for file in staged:
            move_durably(file.path, folder / file.id)
        yield add_rows
    except RookeryError:
        is_named = False
        raise
    finally:
        if not is_named:
            for file in staged:
                (folder / file.id).unlink(missing_ok=True)


def sweep_uploads(uploads: Path, known: Collection[str], before: float) -> None:
    """Deletes bytes of no row that nobody has written to since `before`, unix seconds: their gateway has died."""
    for path in uploads.iterdir():
        is_ours = path.name.startswith(("upload-", "file-")) and path.name not in known
        with contextlib.suppress(FileNotFoundError):  # somebody else was quicker
            if is_ours and path.stat().st_ctime < before:  # of the last rename or write
                path.unlink()


def make_private(folder: Path) -> None:
    """There is such a folder, for the service's own user alone: what people sent lies there."""
    make_folder(folder)
    with contextlib.suppress(PermissionError):  # another user's, who shares it
        folder.chmod(0o700)


def move_durably(source: Path, target: Path) -> None:
    """Rename, or copy across file systems; on disk when it returns. Raises: StoreUnavailable."""
    part = target.with_name(target.name + ".part")
    try:
        try:
            os.replace(source, part)
        except OSError as exc:
            if exc.errno != errno.EXDEV:
                raise
            shutil.copyfile(source, part)
            source.unlink()
        sync(part)
        os.replace(part, target)
        sync(target.parent)
    except OSError as exc:
        part.unlink(missing_ok=True)
        raise disk_error("keep an upload", exc) from exc
