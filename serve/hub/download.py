"""Brings one file of a Hub's repository to this disk: whole, checked, and from where an earlier attempt ended.

Knows nothing of models: what a file should be is told by `Expected`. What arrives is believed only when its digest is
right, whoever sent it; how long that may take and how often it is tried is the session's business.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from serve.errors import DiskFull, ModelUnusable, StoreUnavailable, disk_error
from serve.hub.answers import Answer, Failure, Subject, unavailable
from serve.hub.pace import Deadline
from serve.hub.session import Session

ETAG_SUFFIX = ".etag"  # of the file beside an unfinished one: what its server called it
_READ_BYTES = 2**20
_COMMIT = re.compile(r"/resolve/([0-9a-f]{40})/")


@dataclass(frozen=True, slots=True)
class Expected:
    """What the Hub says of a file, as far as it does; `limit` is what we take at most, in bytes."""

    name: str
    num_bytes: int | None
    sha256: str | None  # of large files
    blob_id: str | None  # git's, of the others
    limit: int

    @property
    def digest(self) -> str | None:
        return self.sha256 or self.blob_id


def download(
    session: Session,
    path: str,
    expected: Expected,
    target: Path,
    deadline: Deadline,
    on_bytes: Callable[[int], None] = lambda num_bytes: None,
) -> None:
    """Completes `target`, which may hold the file's beginning already, from the Hub's `path`.

    `on_bytes` gets each change of its length: also what was there before, and less than 0 when it starts over.
    When it raises, what has come stays for the next time, with `target` + ETAG_SUFFIX beside it.
    Raises: ModelUnusable when the Hub does not send what it promises; and as `Session.get_json`; DiskFull.
    """
    if expected.num_bytes is not None and expected.num_bytes > expected.limit:
        raise ModelUnusable(
            f"{expected.name} of '{Subject.of(path).repo}' has {expected.num_bytes:,} bytes; {expected.limit:,} are "
            "the limit."
        )
    with _part(target, expected, on_bytes) as part:
        session.retrying(lambda: _complete(session, path, expected, part, deadline), deadline)
    part.etag_file.unlink(missing_ok=True)


def _complete(session: Session, path: str, expected: Expected, part: _Part, deadline: Deadline) -> None:
    """One try to bring what is missing. Raises: Failure."""
    if not part.is_whole():
        with session.stream(path, deadline, start=part.num_bytes, etag=part.etag()) as answer:
            _take(answer, path, expected, part)
    if expected.num_bytes is not None and part.num_bytes < expected.num_bytes:
        raise Failure(unavailable(f"The Hub ends {expected.name} too early"), blames="repository")
    if not part.is_right():
        part.restart()
        raise _damaged(path, expected, "its checksum differs")


def _take(answer: Answer, path: str, expected: Expected, part: _Part) -> None:
    """Appends an answer to the part. Raises: Failure when it is not the answer to our question."""
    try:
        _check_head(answer, path, expected, part)
        if answer.status == 200 and part.num_bytes:  # another file by now, or a server that knows no ranges
            part.restart()
        part.remember(answer.headers.get("ETag"))
        for chunk in answer.chunks:
            if part.num_bytes + len(chunk) > part.most:
                raise _damaged(path, expected, "it is longer than it should be")
            part.append(chunk)
    except Failure as exc:
        if exc.blames == "nobody":
            part.restart()
        raise


def _check_head(answer: Answer, path: str, expected: Expected, part: _Part) -> None:
    """Refuses an answer before its body is read."""
    if answer.status == 416:
        raise _damaged(path, expected, f"the Hub has nothing of it after {part.num_bytes} bytes")
    if answer.headers.get("Content-Type", "").lower().startswith("text/html"):
        # A page of somebody in between, or of a Hub in trouble: no file of a model is one.
        error = StoreUnavailable(f"The Hub sends a web page for {Subject.of(path)}.", retry_after_s=60)
        raise Failure(error, blames="repository", most=2)
    commit = _COMMIT.search(path)
    if commit and answer.commit not in (None, commit[1]):
        raise _damaged(path, expected, "it is another commit's")
    if expected.digest and answer.etag and answer.etag != expected.digest:
        raise _damaged(path, expected, "its ETag is another file's")
    start, total = _range(answer)
    if answer.status == 206 and start != part.num_bytes:
        raise _damaged(path, expected, "another part of it was sent than was asked for")
    if total is not None and (total > part.most or total != (expected.num_bytes or total)):
        raise _damaged(path, expected, f"it has {total} bytes instead of {part.most}")


def _range(answer: Answer) -> tuple[int | None, int | None]:
    """Where the answer begins in the file, and the file's length, as far as it says."""
    if answer.status == 206:
        match = re.fullmatch(
            r"bytes ([0-9]{1,18})-[0-9]+/(?:([0-9]{1,18})|\*)", answer.headers.get("Content-Range", "")
        )
        return (int(match[1]), int(match[2]) if match[2] else None) if match else (None, None)
    length = answer.headers.get("Content-Length", "")
    return 0, int(length) if re.fullmatch(r"[0-9]{1,18}", length) else None


def _damaged(path: str, expected: Expected, why: str) -> Failure:
    what = f"{expected.name} of '{Subject.of(path).repo}'"
    error = ModelUnusable(f"{what} does not arrive as the Hub describes it: {why}.")
    return Failure(error, blames="nobody", most=2)


class _Part:
    """The beginning of a file on disk, and its running digest. Its errors are OSErrors."""

    def __init__(self, path: Path, file: BinaryIO, expected: Expected, on_bytes: Callable[[int], None]) -> None:
        self._file, self._expected, self._on_bytes = file, expected, on_bytes
        self.etag_file = path.with_name(path.name + ETAG_SUFFIX)
        self.most = expected.limit if expected.num_bytes is None else expected.num_bytes
        self.num_bytes = 0
        self._digest = _digest(expected)
        self._read_what_is_here(os.fstat(file.fileno()).st_size)

    def etag(self) -> str | None:
        """What the server called the file that this is the beginning of, if it can be compared by that."""
        return self.etag_file.read_text(encoding="utf-8") if self.etag_file.exists() else None

    def remember(self, etag: str | None) -> None:
        if etag and re.fullmatch(r'"[!#-~]{1,200}"', etag):  # a strong one
            self.etag_file.write_text(etag, encoding="utf-8")

    def append(self, chunk: bytes) -> None:
        self._file.write(chunk)
        self._count(chunk)

    def restart(self) -> None:
        self._file.flush()
        self._file.truncate(0)
        self.etag_file.unlink(missing_ok=True)
        self._on_bytes(-self.num_bytes)
        self.num_bytes, self._digest = 0, _digest(self._expected)

    def is_whole(self) -> bool:
        return self.num_bytes == self._expected.num_bytes

    def is_right(self) -> bool:
        return self._digest is None or self._digest.hexdigest() == self._expected.digest

    def _read_what_is_here(self, size: int) -> None:
        if size > self.most:
            return self.restart()
        self._file.seek(0)
        while self.num_bytes < size and (chunk := self._file.read(_READ_BYTES)):
            self._count(chunk)

    def _count(self, chunk: bytes) -> None:
        if self._digest:
            self._digest.update(chunk)
        self.num_bytes += len(chunk)
        self._on_bytes(len(chunk))


@contextmanager
def _part(path: Path, expected: Expected, on_bytes: Callable[[int], None]) -> Iterator[_Part]:
    """What is at `path`, to be continued; the disk's errors as ours."""
    try:
        with path.open("a+b") as file:  # all writes go to the end
            yield _Part(path, file, expected, on_bytes)
    except OSError as exc:
        error = disk_error(f"write '{path.name}'", exc)
        if isinstance(error, DiskFull):  # it is not kept full by what we have brought
            _remove(path)
        raise error from exc
    except ModelUnusable:
        _remove(path)
        raise


def _remove(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.with_name(path.name + ETAG_SUFFIX).unlink(missing_ok=True)


def _digest(expected: Expected) -> Any:
    """A running digest of the kind that is promised; None where there is nothing to compare with."""
    if expected.sha256:
        return hashlib.sha256()
    if expected.blob_id and expected.num_bytes is not None:
        return hashlib.sha1(f"blob {expected.num_bytes}\0".encode(), usedforsecurity=False)
    return None
