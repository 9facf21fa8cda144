"""Reads an uploaded file that may be anything: bounded, streamed, never unpacked to disk.

Knows zip, gzip and text encodings, and no archive format. Whatever is wrong with the bytes becomes a
`BadUpload` here, so that importers only ever see text.
"""

from __future__ import annotations

import codecs
import gzip
import io
import re
import stat
import struct
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, BinaryIO, TextIO, cast

from serve.errors import BadUpload

# An archive with media has thousands of members; each costs memory before one of them is opened.
MAX_MEMBERS = 20_000
# The zip directory of 20,000 members with names of 200 bytes and extra fields is about 6 MB.
MAX_DIRECTORY_BYTES = 16 * 2**20
# X cuts tweets.js into parts near 100 MB. All limits are on bytes that really came out, not on claims.
MAX_MEMBER_BYTES = 512 * 2**20
MAX_TOTAL_BYTES = 2 * 2**30
# JSON of tweets shrinks 5 to 20 times; deflate can reach 1,032, and only bombs go past 200.
MAX_RATIO = 200
RATIO_FLOOR_BYTES = 2**20  # an all-blank member this small does no harm, whatever its ratio
MAX_LINE_CHARS = 2**20  # CSV rows with all of a tweet's JSON in them have some 10,000

HEAD_BYTES = 64 * 2**10
_CHUNK_BYTES = 2**20
_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
_ZIP_STARTS = (b"PK\x03\x04", b"PK\x05\x06")  # a first member; the end of an empty zip
_ENCRYPTED_BIT = 0x1
_LOCAL_HEADER_BYTES = 30
# All that zipfile, gzip and zlib raise on bytes made to break them.
_DAMAGE = (
    zipfile.BadZipFile,
    NotImplementedError,
    RuntimeError,
    ValueError,
    OverflowError,
    EOFError,
    OSError,
    zlib.error,
    struct.error,
)


@dataclass
class _Budget:
    """Bytes that have come out of one upload, all members together."""

    spent: int = 0


class _BoundedReader(io.RawIOBase):
    """A stream of unpacked bytes that refuses to become too many."""

    def __init__(self, source: IO[bytes], name: str, packed_bytes: int | None, budget: _Budget) -> None:
        self._source, self._name, self._packed_bytes, self._budget = source, name, packed_bytes, budget
        self._num_bytes = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            data = self._source.read(len(buffer))
        except _DAMAGE as exc:
            raise BadUpload(f"{self._name} is damaged: it cannot be unpacked. Upload it anew.", param="file") from exc
        self._count(len(data))
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        self._source.close()
        super().close()

    def _count(self, num_bytes: int) -> None:
        self._num_bytes += num_bytes
        self._budget.spent += num_bytes
        if self._num_bytes > MAX_MEMBER_BYTES:
            raise BadUpload(f"{self._name} has more than {MAX_MEMBER_BYTES // 2**20} MiB of text.", param="file")
        if self._budget.spent > MAX_TOTAL_BYTES:
            raise BadUpload(f"The archive has more than {MAX_TOTAL_BYTES // 2**30} GiB of text.", param="file")
        allowed = RATIO_FLOOR_BYTES if self._packed_bytes is None else self._packed_bytes * MAX_RATIO
        if self._packed_bytes is not None and self._num_bytes > max(allowed, RATIO_FLOOR_BYTES):
            raise BadUpload(
                f"{self._name} unpacks to more than {MAX_RATIO} times its size, which no real archive does.",
                param="file",
            )


class _BoundedFile(io.FileIO):
    """A file that no directory entry can make us read in one piece."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is not None and size > MAX_DIRECTORY_BYTES:
            raise zipfile.BadZipFile(f"a directory of {size} bytes")
        return super().read(size) or b""


class ZipMembers:
    """The members of a zip by name. Nothing is opened that is not asked for by name."""

    def __init__(self, file: zipfile.ZipFile, name: str, budget: _Budget) -> None:
        self._file, self._name, self._budget = file, name, budget
        members = file.infolist()
        if len(members) > MAX_MEMBERS:
            raise BadUpload(f"{name} has {len(members):,} members; at most {MAX_MEMBERS:,} are read.", param="file")
        _check_no_overlap(members, file.start_dir, name)
        if any(_leads_outside(member.filename) for member in members):
            raise BadUpload(f"{name} has a member whose path leads out of the zip.", param="file")
        self._members: dict[str, list[zipfile.ZipInfo]] = {}
        for member in members:
            self._members.setdefault(member.filename, []).append(member)

    @property
    def names(self) -> tuple[str, ...]:
        """In the zip's own order, without what macOS adds when it zips a folder."""
        return tuple(name for name in self._members if not name.startswith("__MACOSX/"))

    def __contains__(self, member: str) -> bool:
        return member in self._members

    @contextmanager
    def open_text(self, member: str) -> Iterator[TextIO]:
        """The member as UTF-8 text. Raises: BadUpload when it is absent, doubled, encrypted or odd."""
        info = self._checked(member)
        shown = f"{quoted(member)} in {self._name}"
        try:
            source = self._file.open(info)
        except _DAMAGE as exc:
            raise BadUpload(
                f"{shown} is damaged: it cannot be opened. Download the archive anew.", param="file"
            ) from exc
        reader = _BoundedReader(source, shown, info.compress_size, self._budget)
        with io.TextIOWrapper(io.BufferedReader(reader, _CHUNK_BYTES), "utf-8-sig", errors="replace") as text:
            yield text

    def _checked(self, member: str) -> zipfile.ZipInfo:
        found = self._members.get(member, [])
        shown = f"{quoted(member)} in {self._name}"
        if len(found) != 1:
            raise BadUpload(f"{shown} was expected once and is there {len(found)} times.", param="file")
        info = found[0]
        if info.flag_bits & _ENCRYPTED_BIT:
            raise BadUpload(f"{shown} is encrypted; upload the archive without a password.", param="file")
        if info.compress_type not in _METHODS:
            raise BadUpload(f"{shown} is packed by method {info.compress_type}; only deflate is read.", param="file")
        if stat.S_ISLNK(info.external_attr >> 16) or info.is_dir():
            raise BadUpload(f"{shown} is a link or a folder and not a file.", param="file")
        return info


def _check_no_overlap(members: list[zipfile.ZipInfo], start_of_directory: int, name: str) -> None:
    # Python 3.11.7 reads members that share bytes: 70 KB can claim 10 GB. A member's local header may be
    # longer than counted here, never shorter, so honest files always pass.
    ordered = sorted(members, key=lambda member: member.header_offset)
    starts = [*(member.header_offset for member in ordered), start_of_directory]
    for member, next_start in zip(ordered, starts[1:], strict=True):
        if member.header_offset + _LOCAL_HEADER_BYTES + member.compress_size > next_start:
            raise BadUpload(f"{name} has members that overlap each other, which no real archive does.", param="file")


def _leads_outside(path: str) -> bool:
    return path.startswith(("/", "\\")) or ".." in re.split(r"[/\\]", path) or path[1:2] == ":"


@dataclass
class Upload:
    """One uploaded file under the user's own name. `members` is there when it is a zip."""

    path: Path
    filename: str
    head: bytes  # the first 64 KiB, after gzip
    is_gzip: bool
    members: ZipMembers | None = None
    _budget: _Budget = field(default_factory=_Budget)
    _encoding: str | None = None

    @property
    def name(self) -> str:
        """For messages: printable and short, in quotes."""
        return quoted(self.filename)

    @property
    def extension(self) -> str:
        """`.csv` of `A.csv` and of `A.CSV.gz`."""
        return Path(self.filename.lower().removesuffix(".gz")).suffix

    @property
    def head_text(self) -> str:
        """The head, decoded; a character cut at its end is left out."""
        decoder = codecs.getincrementaldecoder(self.encoding)("replace")
        return decoder.decode(self.head).removeprefix("\ufeff")

    @property
    def encoding(self) -> str:
        if self._encoding is None:
            self._encoding = _encoding_of(self)
        return self._encoding

    @contextmanager
    def open_bytes(self) -> Iterator[BinaryIO]:
        with open(self.path, "rb") as file:
            packed_bytes = self.path.stat().st_size if self.is_gzip else None
            source = cast(IO[bytes], gzip.GzipFile(fileobj=file) if self.is_gzip else file)
            reader = _BoundedReader(source, self.name, packed_bytes, _Budget())
            with io.BufferedReader(reader, _CHUNK_BYTES) as buffered:
                yield buffered

    @contextmanager
    def open_text(self) -> Iterator[TextIO]:
        """The whole as text, in whatever encoding it is; line ends as they are (lines end at CR, LF or CRLF)."""
        with self.open_bytes() as stream, io.TextIOWrapper(stream, self.encoding, "replace", newline="") as text:
            yield text


@contextmanager
def open_upload(path: Path, filename: str) -> Iterator[Upload]:
    """Raises: BadUpload for what cannot be opened, is empty or is a zip made to do harm."""
    name = quoted(filename)
    try:
        with _BoundedFile(path) as file:
            start = file.read(4)
            if not start:
                raise BadUpload(f"{name} is empty.", param="file")
            if start in _ZIP_STARTS:
                with _open_zip(file, name) as archive:
                    yield _zip_upload(path, filename, archive)
                return
    except OSError as exc:
        raise BadUpload(f"{name} cannot be read here.", param="file") from exc
    yield _plain_upload(path, filename, is_gzip=start.startswith(b"\x1f\x8b"))


def _zip_upload(path: Path, filename: str, archive: zipfile.ZipFile) -> Upload:
    upload = Upload(path, filename, b"", is_gzip=False)
    upload.members = ZipMembers(archive, upload.name, upload._budget)
    return upload


def _plain_upload(path: Path, filename: str, *, is_gzip: bool) -> Upload:
    upload = Upload(path, filename, b"", is_gzip)
    with upload.open_bytes() as stream:
        upload.head = stream.read(HEAD_BYTES)
    if not upload.head_text.strip():
        raise BadUpload(f"{upload.name} is empty.", param="file")
    return upload


def _open_zip(file: IO[bytes], name: str) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(file)
    except _DAMAGE as exc:
        raise BadUpload(f"{name} is a damaged or incomplete zip; download the archive anew.", param="file") from exc


_BOMS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),  # before UTF-16, whose mark it begins with
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


def _encoding_of(upload: Upload) -> str:
    """By byte-order mark; else UTF-8 unless most of what is not ASCII is not UTF-8 either: then Windows-1252."""
    for mark, encoding in _BOMS:
        if upload.head.startswith(mark):
            return encoding
    if upload.head[1:8:2] == bytes(4) or upload.head[:8:2] == bytes(4):
        return "utf-16-le" if upload.head[0] else "utf-16-be"
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    num_bad = num_foreign = 0
    with upload.open_bytes() as stream:
        while chunk := stream.read(_CHUNK_BYTES):
            if not chunk.isascii():
                text = decoder.decode(chunk)
                num_bad += text.count("\ufffd")
                num_foreign += len(text) - len(text.encode("ascii", "ignore"))
    return "cp1252" if num_bad * 2 > num_foreign else "utf-8"


def read_lines(text: TextIO, name: str) -> Iterator[str]:
    """Lines with their ends. Raises: BadUpload for a line that no person wrote, before it fills memory."""
    while line := text.readline(MAX_LINE_CHARS):
        if len(line) == MAX_LINE_CHARS:
            raise BadUpload(f"{name} has a line of more than {MAX_LINE_CHARS:,} characters.", param="file")
        yield line


def quoted(filename: str) -> str:
    """A user's file name, fit for a message."""
    base = re.split(r"[/\\]", filename)[-1]
    printable = "".join(char for char in base if char.isprintable())
    return f"'{printable[:80]}'"
